"""Metrics (pure functions) and evaluators."""
