"""Which checkpoint is the best, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from triptych.core.config import Config, did_you_mean
from triptych.core.errors import TrainingError


class BestConfig(Config):
    """Follow one evaluation metric: keep the best checkpoint and, with `patience`, stop early."""

    metric: str
    """Name in the evaluation results."""
    mode: Literal["min", "max"] = "min"
    """`min`: lower is better (a loss); `max`: higher is better (an accuracy)."""
    delta: float = Field(default=0.001, ge=0)
    """The value must be better by more than this than at the last reset of the patience to reset it. Small steps add
    up: progress slower than `delta` in `patience` evaluations stops the run."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations in a row without such an improvement; None never stops."""


class BestTracker:
    """The best value so far and the patience left.

    Any improvement, however small, makes a new best. A value that is not finite is never an improvement and counts
    against the patience, also as the very first.
    """

    def __init__(self, config: BestConfig) -> None:
        self._config = config
        self.value: float | None = None
        """Best value so far."""
        self.step: int | None = None
        """Step of the best value."""
        self.results: dict[str, float] = {}
        """All results of the evaluation at that step."""
        self._reference: float | None = None
        self._stale = 0

    @property
    def should_stop(self) -> bool:
        """True when the patience is used up."""
        return self._config.patience is not None and self._stale >= self._config.patience

    def update(self, step: int, results: Mapping[str, float]) -> bool:
        """Take in an evaluation; True when it is the best so far.

        Raises:
            TrainingError: the metric is not among the results.
        """
        if self._config.metric not in results:
            raise TrainingError(
                f"the evaluation has no metric `{self._config.metric}`",
                key="train.best.metric",
                remedy=did_you_mean(self._config.metric, results),
            )
        value = results[self._config.metric]
        if self._is_better(value, self._reference, self._config.delta):
            self._reference, self._stale = value, 0
        else:
            self._stale += 1
        if not self._is_better(value, self.value, 0.0):
            return False
        self.value, self.step, self.results = value, step, dict(results)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {
            "value": self.value,
            "step": self.step,
            "results": self.results,
            "reference": self._reference,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.value, self.step, self.results = state["value"], state["step"], state["results"]
        self._reference, self._stale = state["reference"], state["stale"]

    def _is_better(self, value: float, than: float | None, by: float) -> bool:
        if not math.isfinite(value):
            return False
        if than is None:
            return True
        return value < than - by if self._config.mode == "min" else value > than + by
