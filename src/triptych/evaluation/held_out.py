"""The loss on rows that are not trained on, with the same exact denominators as in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from triptych.core.errors import TrainingError
from triptych.core.protocols import BatchSource, Objective, Reference
from triptych.engine.measure import measure_window
from triptych.engine.parallel import Runtime
from triptych.models.modes import evaluation_mode


class HeldOutLoss:
    """Evaluator: loss and metrics of an objective over a held-out source, as one window.

    One window makes the figures independent of how rows are batched, also for objectives that couple them.
    """

    def __init__(
        self,
        scorer: nn.Module,
        objective: Objective,
        source: BatchSource,
        reference: Reference | None,
        runtime: Runtime,
    ) -> None:
        """Args:
            scorer: the wrapped scorer.
            objective: what is measured.
            source: yields every held-out row once, in a single window.
            reference: adds the reference model's numbers, or None.
            runtime: device and precision.

        Raises:
            TrainingError: the source has more than one window.
        """
        if source.total_windows != 1:
            raise TrainingError(f"a held-out source must be one window, this one has {source.total_windows}")
        self.scorer = scorer
        self.objective = objective
        self.source = source
        self.reference = reference
        self.runtime = runtime
        self._start = source.state_dict()

    def run(self) -> Mapping[str, float]:
        """`loss`, `loss/<term>` and the objective's metrics, equal on every rank."""
        self.source.load_state_dict(self._start)
        with evaluation_mode(self.scorer), torch.no_grad():
            (window,) = self.source.windows()
            result = measure_window(self.scorer, self.objective, window, self.source, self.reference, self.runtime)
        terms = {f"loss/{name}": value for name, value in result.terms.items()}
        return {"loss": result.loss, **terms, **result.metrics}
