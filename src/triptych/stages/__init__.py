"""Composition roots: build everything, then fit(); no loops, no maths."""
