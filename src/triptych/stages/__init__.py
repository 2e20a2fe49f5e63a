"""Composition roots: build everything, then fit(); no loops, no maths. Kept light: `doctor` must start anywhere."""
