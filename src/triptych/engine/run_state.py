"""All that changes while a run goes on, as one thing that can be written and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.core import distributed
from triptych.core.protocols import BatchSource, Monitor
from triptych.engine.checkpoint import Snapshot
from triptych.engine.parallel import Runtime, unwrap
from triptych.engine.state import (
    gather_tensors,
    pack_optimizer,
    plain,
    random_state,
    restore_optimizer,
    restore_random_state,
    restore_tensors,
)


@dataclass(frozen=True)
class RunState:
    """Weights, optimizer, scaler, data position, random numbers and monitors of a run; every rank has one."""

    scorer: nn.Module
    parameters: Mapping[str, nn.Parameter]
    """Trained parameters by qualified name."""
    optimizer: torch.optim.Optimizer
    runtime: Runtime
    source: BatchSource
    monitors: Sequence[Monitor]

    def capture(self, step: int, trainer: Mapping[str, Any], summary: Mapping[str, Any]) -> Snapshot:
        """Everything as it is now; on a CPU it shares memory with the run. Every rank must call it.

        Args:
            step: Steps taken.
            trainer: The trainer's own state, the same on every rank.
            summary: A few numbers for people.
        """
        names = {id(item): name for name, item in self.parameters.items()}
        monitors = {key: monitor.state_dict() for key, monitor in self._named_monitors().items()}
        mine = {"random": random_state(), "source": self.source.state_dict()}
        return Snapshot(
            step=step,
            weights=gather_tensors(self._tensors()),
            optimizer=pack_optimizer(self.optimizer, names),
            shared={"trainer": trainer, "scaler": self.runtime.state_dict(), "monitors": monitors},
            ranks=distributed.all_gather_objects(plain(mine, "rank")),
            summary=summary,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back, the random numbers last, so that nothing in between can draw one.

        Raises:
            CheckpointError: the weights or the optimizer do not fit this model.
        """
        self.restore_weights(snapshot.weights)
        names = {id(item): name for name, item in self.parameters.items()}
        restore_optimizer(self.optimizer, names, snapshot.optimizer)
        self.runtime.load_state_dict(snapshot.shared["scaler"])
        saved = snapshot.shared["monitors"]
        for key, monitor in self._named_monitors().items():
            if key in saved:  # Monitors may change between two starts of a run.
                monitor.load_state_dict(saved[key])
        mine = snapshot.ranks[distributed.rank()]
        self.source.load_state_dict(mine["source"])
        restore_random_state(mine["random"])

    def restore_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what is trained and the buffers alone.

        Raises:
            CheckpointError: they do not fit this model.
        """
        restore_tensors(self._tensors(), weights, "weights")

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **dict(unwrap(self.scorer).named_buffers())}

    def _named_monitors(self) -> dict[str, Monitor]:
        named: dict[str, Monitor] = {}
        for monitor in self.monitors:
            name = type(monitor).__name__
            same = sum(key.partition(" ")[0] == name for key in named)
            named[f"{name} {same}"] = monitor
        return named
