"""Triptych trains vision-language models: pre-train, instruct, align."""

__version__ = "0.1.0"
