"""Bytes on disk to batches of weighted tokens."""
