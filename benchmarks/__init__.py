"""Comparisons with peers, run with `make bench`."""
