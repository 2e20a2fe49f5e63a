"""From a run to a Hugging Face checkpoint, and proof that it is the same model."""
