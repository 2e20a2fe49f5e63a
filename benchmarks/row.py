"""What a row of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.models import FULL, Scale
from benchmarks.timing import Way


@dataclass(frozen=True)
class Row:
    """A comparison that is ready to run."""

    ours: Way
    peer: Way
    peer_name: str
    unit: str = "seconds a step"
    compares_memory: bool = True
    """Whether the memory of both ways is put in relation."""


@dataclass(frozen=True)
class Setting:
    """Where a row runs."""

    scale: Scale = FULL
    bf16: bool = False


Build = Callable[[Setting], Row]
