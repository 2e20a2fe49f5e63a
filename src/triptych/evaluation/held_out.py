"""The loss on rows that are not trained on, with the same exact denominators as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from triptych.core.distributed import all_gather_rows, all_reduce_max, all_reduce_sum
from triptych.core.protocols import BatchSource, Objective, Reference, WindowObjective
from triptych.core.types import Batch, Progress, Scores, Window, WindowValues


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the former training flags of every sub-module afterwards."""
    flags = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, child in module.named_modules():
            child.training = flags[name]


class HeldOutLoss:
    """Evaluator: each term of the objective divided by its weight over the whole held-out source.

    A window objective sees each of the source's windows as one batch of negatives; the mean over windows is weighted
    by the term's weight, so give the source one window for a figure that does not depend on its size.
    """

    def __init__(
        self,
        scorer: nn.Module,
        objective: Objective,
        source: BatchSource,
        reference: Reference | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scorer = scorer
        self.objective = objective
        self.source = source
        self.reference = reference
        self.device = torch.device(device)
        self._start = source.state_dict()

    def run(self) -> Mapping[str, float]:
        """`loss`, `loss/<term>` and the objective's metrics, equal on every rank."""
        sums: dict[str, Tensor] = {}
        self.source.load_state_dict(self._start)
        with evaluation_mode(self.scorer):
            for window in self.source.windows():
                self._add_window(window, sums)
        names = sorted(sums)
        if not names:
            return {}
        totals = all_reduce_sum(torch.stack([sums[name] for name in names]).to(self.device))
        return self._divide({name: totals[index] for index, name in enumerate(names)})

    def _add_window(self, window: Window, sums: dict[str, Tensor]) -> None:
        # FSDP gathers parameters in every forward pass, so ranks must run the same number of batches.
        count = int(all_reduce_max(torch.tensor(len(window.batches), device=self.device)))
        observed: list[Mapping[str, Tensor]] = []
        batches: list[Batch] = []
        for index in range(count):
            light = window.batches[min(index, len(window.batches) - 1)]
            batch = self.source.attach(light).to(self.device)
            if self.reference is not None:
                batch = self.reference.attach(batch)
            scores: Scores = self.scorer(batch)
            if light.is_padding or index >= len(window.batches):
                continue
            weights = self.objective.weights(batch, Progress(0, None))
            if isinstance(self.objective, WindowObjective):
                observed.append(self.objective.observe(scores, batch))
                batches.append(light.to(self.device))
            else:
                _accumulate(sums, "term", self.objective.terms(scores, batch, None))
            _accumulate(sums, "weight", weights)
            for name, (total, weight) in self.objective.metrics(scores, batch).items():
                _accumulate(sums, "metric", {name: total})
                _accumulate(sums, "metric_weight", {name: weight})
        if isinstance(self.objective, WindowObjective):
            self._add_window_terms(self.objective, batches, observed, sums)

    def _add_window_terms(
        self,
        objective: WindowObjective,
        batches: list[Batch],
        observed: list[Mapping[str, Tensor]],
        sums: dict[str, Tensor],
    ) -> None:
        values: dict[str, Tensor] = {}
        first: dict[str, int] = {}
        for name in observed[0] if observed else ():
            parts = [values_of[name] for values_of in observed]
            if parts[0].ndim == 0:
                values[name] = parts[0]
            else:
                values[name], first[name] = all_gather_rows(torch.cat(parts))
        for batch, local in zip(batches, observed, strict=True):
            counts = {name: len(value) for name, value in local.items() if value.ndim}
            window = WindowValues(values, dict(first), counts)
            _accumulate(sums, "term", objective.window_terms(batch, window))
            for name, (total, weight) in objective.window_metrics(batch, window).items():
                _accumulate(sums, "metric", {name: total})
                _accumulate(sums, "metric_weight", {name: weight})
            for name, count in counts.items():
                first[name] += count

    def _divide(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        results: dict[str, float] = {}
        loss = 0.0
        for term, coefficient in self.objective.coefficients.items():
            weight = float(totals.get(f"weight/{term}", 0.0))
            if weight > 0:
                results[f"loss/{term}"] = float(totals[f"term/{term}"]) / weight
                loss += coefficient * results[f"loss/{term}"]
        results["loss"] = loss
        for name, total in totals.items():
            if name.startswith("metric/"):
                metric = name.removeprefix("metric/")
                weight = float(totals[f"metric_weight/{metric}"])
                if weight > 0:
                    results[metric] = float(total) / weight
        return results


def _accumulate(sums: dict[str, Tensor], prefix: str, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        key = f"{prefix}/{name}"
        value = value.detach().double()
        sums[key] = sums[key] + value if key in sums else value
