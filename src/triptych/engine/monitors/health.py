"""Warnings about a run that is going wrong; what must stop it is stopped by the trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from triptych.core import distributed
from triptych.core.config import Config
from triptych.core.types import Progress, StepRecord

logger = logging.getLogger(__name__)

LOSS_SCALE = "loss_scale"
"""Name of the metric under which the trainer reports the fp16 gradient scaler."""


class HealthConfig(Config):
    """Warn about losses and gradients that look wrong."""

    kind: Literal["health"] = "health"
    """Selects this monitor."""
    spike: float = Field(default=3.0, gt=1)
    """A loss above this many times its running mean is a spike."""
    warmup: int = Field(default=20, ge=1)
    """Steps before a spike can be told."""
    exploding: float = Field(default=100.0, gt=0)
    """A component's gradient norm (before clipping) above this is a risk of explosion."""
    vanishing: float = Field(default=1e-7, ge=0)
    """A component's gradient norm below this teaches it nothing."""
    plateau: int = Field(default=1000, ge=2)
    """The mean loss of each this many steps is compared with that of the same number before."""
    min_decline: float = 0.001
    """Share by which it must have fallen not to be called slow convergence."""
    quiet: int = Field(default=100, ge=1)
    """Steps for which a warning of the same sort is counted but not repeated."""


class HealthMonitor:
    """Loss spikes, exploding and vanishing gradients, non-finite metrics, fp16 overflows and slow convergence.

    `counts` holds how often each was seen, on every rank alike. The running mean is
    m_t = 0.95 m_(t-1) + 0.05 loss_t, divided by 1 - 0.95^t.
    """

    _DECAY = 0.95

    def __init__(self, config: HealthConfig, output: Path, log_every: int) -> None:
        self._config = config
        self.counts: dict[str, int] = {}
        """Sort of warning -> times seen."""
        self._warned: dict[str, int] = {}
        self._mean, self._steps = 0.0, 0
        self._sum, self._count = 0.0, 0
        self._previous: float | None = None

    def on_start(self, progress: Progress) -> None:
        """Nothing to prepare."""

    def on_step(self, record: StepRecord) -> None:
        """Look at one step."""
        step = record.progress.step
        if record.is_skipped:
            self._warn("skipped step", step, "fp16 overflow: the step was skipped and the loss scale lowered")
        scale = record.metrics.get(LOSS_SCALE)
        if scale is not None and scale < 1.0:
            self._warn("loss scale", step, f"the fp16 loss scale is down to {scale:g}; use bf16 or fp32")
        for name, value in {**record.terms, **record.metrics}.items():
            if not math.isfinite(value):
                self._warn("non-finite value", step, f"`{name}` is {value}")
        if not record.is_skipped:
            self._check_gradients(record)
        if math.isfinite(record.loss):
            self._check_loss(step, record.loss)

    def on_evaluation(self, progress: Progress, results: Mapping[str, float]) -> None:
        """Look at an evaluation."""
        for name, value in results.items():
            if not math.isfinite(value):
                self._warn("non-finite value", progress.step, f"evaluation `{name}` is {value}")

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """Nothing to see."""

    def on_end(self, progress: Progress, error: BaseException | None) -> None:
        """Sum up."""
        if self.counts and distributed.is_main():
            logger.warning("health: %s", ", ".join(f"{count} x {name}" for name, count in self.counts.items()))

    def state_dict(self) -> dict[str, Any]:
        """All running values."""
        return {
            "counts": dict(self.counts),
            "warned": dict(self._warned),
            "mean": (self._mean, self._steps),
            "plateau": (self._sum, self._count, self._previous),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.counts, self._warned = dict(state["counts"]), dict(state["warned"])
        self._mean, self._steps = state["mean"]
        self._sum, self._count, self._previous = state["plateau"]

    def _check_gradients(self, record: StepRecord) -> None:
        if not record.samples:
            return  # every row of the window was left out, which the progress line counts
        norms = record.component_gradient_norms or {"all": record.gradient_norm}
        for name, norm in norms.items():
            if norm > self._config.exploding:
                text = f"gradient norm of {name} is {norm:.3g} (over {self._config.exploding:g}): risk of explosion"
                self._warn("exploding gradient", record.progress.step, text)
            elif norm < self._config.vanishing:
                text = f"gradient norm of {name} is {norm:.3g} (under {self._config.vanishing:g}): it learns nothing"
                self._warn("vanishing gradient", record.progress.step, text)

    def _check_loss(self, step: int, loss: float) -> None:
        expected = self._mean / (1 - self._DECAY**self._steps) if self._steps else 0.0
        # A ratio says nothing about losses that may be negative.
        if self._steps >= self._config.warmup and 0 < expected * self._config.spike < loss:
            self._warn("loss spike", step, f"loss {loss:.4g} is over {self._config.spike:g} x its mean {expected:.4g}")
        self._mean = self._DECAY * self._mean + (1 - self._DECAY) * loss
        self._steps += 1
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self._config.plateau:
            return
        mean = self._sum / self._count
        if self._previous is not None and 0 < self._previous * (1 - self._config.min_decline) < mean:
            text = f"the mean loss of the last {self._count} steps is {mean:.4g}, before that {self._previous:.4g}"
            self._warn("slow convergence", step, text)
        self._sum, self._count, self._previous = 0.0, 0, mean

    def _warn(self, sort: str, step: int, text: str) -> None:
        self.counts[sort] = self.counts.get(sort, 0) + 1
        last = self._warned.get(sort)
        if last is not None and step - last < self._config.quiet:
            return
        self._warned[sort] = step
        if distributed.is_main():
            logger.warning("step %d: %s: %s", step, sort, text)
