"""What a row of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.models import FULL, Scale
from benchmarks.timing import Way

CPU = torch.device("cpu")
AS_RUN = "as users run it"
WRITTEN_AGAIN = "its GPU algorithm, written again"
"""Where the peer's path on CPUs computes more than it does on GPUs."""


@dataclass(frozen=True)
class Row:
    """A comparison that is ready to run."""

    ours: Way
    peer: Way
    peer_name: str
    unit: str = "seconds a step"
    peer_kind: str = WRITTEN_AGAIN
    """`AS_RUN` or `WRITTEN_AGAIN`."""
    trains: bool = True
    """False where steps leave no gradients, such as generation: what they return must be equal."""
    compares_memory: bool = True
    """Whether the memory of both ways is put in relation."""


@dataclass(frozen=True)
class Setting:
    """Where a row runs."""

    scale: Scale = FULL
    bf16: bool = False
    compiled: bool = False
    """Our blocks as with `train.runtime.compile`; the peers' are as their users run them."""
    device: torch.device = CPU
    """Of both ways."""

    def autocast(self) -> torch.autocast:
        """bf16 for the forward pass, where the setting says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


Build = Callable[[Setting], Row]
