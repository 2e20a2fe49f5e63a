"""Evaluation mode for a while: frozen parts of a training model are in it already and must stay so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every sub-module has its own flag back."""
    flags = [(item, item.training) for item in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for item, flag in flags:
            item.training = flag
