"""Modules and the facts of model families; know nothing of data, losses or loops."""
