"""What the step files share: exact denominators of a window, its bookkeeping, and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from triptych.core import distributed
from triptych.core.errors import Problem, TrainingError
from triptych.core.protocols import BatchSource, Objective, Reference
from triptych.core.types import Batch, Origin, Progress, Scores, Window, WindowValues
from triptych.engine.parallel import Runtime

AUXILIARY = "auxiliary"
"""Name of the model's own extra loss (`Scores.auxiliary`) among the terms."""


@dataclass(frozen=True)
class NonFinite:
    """A micro-batch whose numbers are not finite."""

    rank: int
    """Process that holds it."""
    micro_batch: int
    """0-based position in that process's window."""
    terms: Mapping[str, float]
    """Term -> its sum over the micro-batch."""
    origins: tuple[Origin, ...]
    """The samples of the micro-batch, one a row."""


@dataclass(frozen=True)
class WindowResult:
    """What one window gave; gradients are left in `.grad`. Equal on every rank, reduced over all."""

    loss: float
    """Sum of coefficient x term / global weight; NaN or infinite where `non_finite` is not empty."""
    terms: Mapping[str, float]
    """Each term divided by its global weight, without its coefficient; terms of weight 0 are absent."""
    weights: Mapping[str, float]
    """Term -> global weight, the denominator used."""
    metrics: Mapping[str, float]
    """Each metric's sum divided by its weight; metrics of weight 0 are absent."""
    empty_terms: tuple[str, ...]
    """Terms whose global weight was 0: they contributed nothing."""
    samples: int
    """Examples of the window."""
    supervised_tokens: int
    """Supervised tokens of the window."""
    tokens: int
    """Tokens of the window without padding."""
    skipped_rows: int
    """Rows left out and reported by the source."""
    data_seconds: float
    """Time spent waiting for `attach`, on the slowest rank."""
    non_finite: tuple[NonFinite, ...]
    """Micro-batches whose loss is not finite; the optimizer must not step when there is one."""

    @property
    def is_empty(self) -> bool:
        """No term of the objective has weight; the model's own loss does not count."""
        return all(name in self.empty_terms for name in self.weights if name != AUXILIARY)


@dataclass(frozen=True)
class WindowPlan:
    """The denominators and the micro-batches of a window, made before any forward pass."""

    batches: tuple[Batch, ...]
    """This rank's light batches, as many as on every other rank: padding batches fill the difference."""
    weights: Mapping[str, float]
    """Term -> global weight."""
    coefficients: Mapping[str, float]
    """Term -> factor in the loss."""
    samples: int
    supervised_tokens: int
    tokens: int
    skipped_rows: int

    def loss(self, terms: Mapping[str, Tensor]) -> Tensor | None:
        """0-d share of the window's loss; None without a term that counts."""
        shares = [(term * self.factor(name)).double() for name, term in terms.items() if self.weights[name] != 0]
        return torch.stack(shares).sum() if shares else None

    def factor(self, name: str) -> float:
        """Coefficient / global weight of a term."""
        return self.coefficients[name] / self.weights[name]


def plan_window(objective: Objective, window: Window, runtime: Runtime, progress: Progress) -> WindowPlan:
    """Add the weights over all micro-batches and ranks, and agree on the number of micro-batches.

    Raises:
        TrainingError: the objective's weights and coefficients name different terms, or a weight is not finite.
    """
    coefficients = objective.coefficients
    terms = dict.fromkeys(sorted(coefficients), 0.0)
    counts = dict.fromkeys(("rows", "samples", "supervised_tokens", "tokens", "skipped_rows"), 0.0)
    counts["skipped_rows"] = float(len(window.skipped))
    for batch in window.batches:
        if batch.is_padding:
            continue
        weights = objective.weights(batch, progress)
        _check_names(weights, coefficients)
        for name, weight in weights.items():
            terms[name] += float(weight)
        counts["rows"] += batch.num_rows
        counts["samples"] += batch.num_examples
        counts["supervised_tokens"] += int(batch.supervised.sum())
        counts["tokens"] += int(batch.lengths.sum())
    local = torch.tensor([*terms.values(), *counts.values()], dtype=torch.float64, device=runtime.device)
    totals = distributed.all_reduce_sum(local).tolist()
    num_batches = int(distributed.all_reduce_max(torch.tensor(len(window.batches), device=runtime.device)))
    global_weights = dict(zip(terms, totals, strict=False))
    counts = dict(zip(counts, totals[len(terms) :], strict=True))
    _check_finite(global_weights)
    return WindowPlan(
        batches=pad_batches(window.batches, num_batches),
        weights={**global_weights, AUXILIARY: counts["rows"]},
        coefficients={**coefficients, AUXILIARY: 1.0},
        samples=int(counts["samples"]),
        supervised_tokens=int(counts["supervised_tokens"]),
        tokens=int(counts["tokens"]),
        skipped_rows=int(counts["skipped_rows"]),
    )


def pad_batches(batches: tuple[Batch, ...], num_batches: int) -> tuple[Batch, ...]:
    """Repeat the shortest batch, marked as padding, until there are `num_batches`.

    Collectives of the forward and backward pass (FSDP) match only if every rank runs as many micro-batches.
    """
    missing = num_batches - len(batches)
    if missing == 0:
        return batches
    cheapest = min(batches, key=lambda batch: batch.input_ids.numel())
    return (*batches, *(replace(cheapest, is_padding=True) for _ in range(missing)))


def anchor(scores: Scores) -> Tensor:
    """0-d zero that depends on every score, so that each backward pass reaches every parameter on every rank.

    An empty slice rather than a factor 0: the gradient is exactly zero even where a score is infinite.
    """
    fields = (value for value in vars(scores).values() if isinstance(value, Tensor) and value.requires_grad)
    return sum((value.reshape(-1)[:0].sum().double() for value in fields), torch.zeros((), dtype=torch.float64))


@dataclass
class Feed:
    """Makes light batches ready for the model and measures the wait."""

    source: BatchSource
    reference: Reference | None
    runtime: Runtime
    seconds: float = 0.0

    def attach(self, batch: Batch) -> Batch:
        """The batch with pixels, on the device."""
        start = time.perf_counter()
        batch = self.source.attach(batch)
        self.seconds += time.perf_counter() - start
        return batch.to(self.runtime.device)

    def prepare(self, batch: Batch) -> Batch:
        """As `attach`, with the reference model's numbers."""
        batch = self.attach(batch)
        if self.reference is not None:
            with self.runtime.autocast():
                batch = self.reference.attach(batch)
        return batch


class _Numbers:
    """0-d tensors in the order they came, copied into blocks on the device.

    Kept one by one, they would lie between the large tensors of the passes and, on a CPU, stop the heap from using
    their space again: it would grow with every micro-batch.
    """

    _BLOCK = 1024

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0

    def add(self, value: Tensor) -> int:
        """Copy a number; its place."""
        place = self._count
        if place % self._BLOCK == 0:
            self._blocks.append(torch.zeros(self._BLOCK, dtype=torch.float64, device=value.device))
        self._blocks[-1][place % self._BLOCK] = value.detach()
        self._count += 1
        return place

    def fetch(self) -> list[float]:
        """All numbers, in one transfer."""
        return torch.cat(self._blocks)[: self._count].tolist() if self._blocks else []


@dataclass
class Tally:
    """Sums of a window, kept on the device until `finish` so that no micro-batch waits for a transfer."""

    objective: Objective
    plan: WindowPlan
    _numbers: _Numbers = field(default_factory=_Numbers)
    _terms: list[tuple[int, str, int]] = field(default_factory=list)
    """(micro-batch, term, place of the number)."""
    _metrics: list[tuple[str, int, int]] = field(default_factory=list)
    """(metric, place of the sum, place of the weight)."""
    _observed: list[tuple[int, int]] = field(default_factory=list)
    """(micro-batch, place of 1 where what it observed is finite, else of 0)."""

    def add_terms(self, micro_batch: int, terms: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's sums; those of weight 0 do not count."""
        _check_known(terms, self.plan.coefficients)
        for name, term in terms.items():
            if self.plan.weights[name] != 0:
                self._terms.append((micro_batch, name, self._numbers.add(term)))

    def add_metrics(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a micro-batch's metric sums and weights."""
        for name, (total, weight) in metrics.items():
            self._metrics.append((name, self._numbers.add(total), self._numbers.add(weight)))

    def add_observed(self, micro_batch: int, values: Mapping[str, Tensor]) -> None:
        """Note whether what was observed is finite: in a coupled loss one bad micro-batch spoils all others."""
        flags = [value.isfinite().all() for value in values.values()]
        self._observed.append((micro_batch, self._numbers.add(torch.stack(flags).all())))

    def finish(self, data_seconds: float) -> WindowResult:
        """Reduce over ranks."""
        numbers = self._numbers.fetch()
        terms = self._local_terms(numbers)
        blamed = [index for index, place in self._observed if not numbers[place]]
        faulty = [index for index, sums in terms.items() if not all(map(math.isfinite, sums.values()))]
        share = _Share(
            terms=_add_all(list(terms.values())),
            metrics=self._local_metrics(numbers),
            data_seconds=data_seconds,
            observed=[self._non_finite(index, terms) for index in blamed],
            losses=[self._non_finite(index, terms) for index in faulty],
        )
        shares: list[_Share] = distributed.all_gather_objects(share)
        return self._result(shares)

    def _result(self, shares: list[_Share]) -> WindowResult:
        plan = self.plan
        sums = _add_all([share.terms for share in shares])
        weights = {name: weight for name, weight in plan.weights.items() if name in sums or name != AUXILIARY}
        counted = [name for name, weight in weights.items() if weight != 0]
        _check_complete(counted, sums)
        metrics = _add_all([{name: pair[0] for name, pair in share.metrics.items()} for share in shares])
        metric_weights = _add_all([{name: pair[1] for name, pair in share.metrics.items()} for share in shares])
        observed = tuple(item for share in shares for item in share.observed)
        losses = tuple(item for share in shares for item in share.losses)
        return WindowResult(
            loss=sum(sums[name] * plan.factor(name) for name in counted),
            terms={name: sums[name] / plan.weights[name] for name in counted},
            weights=weights,
            metrics={name: metrics[name] / weight for name, weight in metric_weights.items() if weight != 0},
            empty_terms=tuple(name for name, weight in weights.items() if weight == 0),
            samples=plan.samples,
            supervised_tokens=plan.supervised_tokens,
            tokens=plan.tokens,
            skipped_rows=plan.skipped_rows,
            data_seconds=max(share.data_seconds for share in shares),
            non_finite=observed or losses,
        )

    def _local_terms(self, numbers: Sequence[float]) -> dict[int, dict[str, float]]:
        """Micro-batch -> term -> sum."""
        result: dict[int, dict[str, float]] = {}
        for index, name, place in self._terms:
            sums = result.setdefault(index, {})
            sums[name] = sums.get(name, 0.0) + numbers[place]
        return result

    def _local_metrics(self, numbers: Sequence[float]) -> dict[str, tuple[float, float]]:
        result: dict[str, tuple[float, float]] = {}
        for name, total_place, weight_place in self._metrics:
            total, weight = result.get(name, (0.0, 0.0))
            result[name] = (total + numbers[total_place], weight + numbers[weight_place])
        return result

    def _non_finite(self, index: int, terms: Mapping[int, Mapping[str, float]]) -> NonFinite:
        return NonFinite(distributed.rank(), index, dict(terms.get(index, {})), self.plan.batches[index].origins)


def micro_batch_terms(
    tally: Tally, index: int, scores: Scores, batch: Batch, window: WindowValues | None
) -> Tensor | None:
    """Note a micro-batch's terms and metrics; return its 0-d share of the loss, None where nothing counts."""
    if batch.is_padding:
        return None
    terms = dict(tally.objective.terms(scores, batch, window))
    if scores.auxiliary is not None:
        terms[AUXILIARY] = scores.auxiliary
    tally.add_terms(index, terms)
    tally.add_metrics(tally.objective.metrics(scores, batch))
    return tally.plan.loss(terms)


@dataclass(frozen=True)
class _Share:
    """One rank's sums."""

    terms: dict[str, float]
    metrics: dict[str, tuple[float, float]]
    data_seconds: float
    observed: list[NonFinite]
    losses: list[NonFinite]


def _add_all(parts: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _check_names(given: Mapping[str, object], coefficients: Mapping[str, float]) -> None:
    if set(given) != set(coefficients):
        raise TrainingError(
            Problem(
                f"the objective's weights name {sorted(given)}, its coefficients {sorted(coefficients)}",
                remedy="make both name the same terms",
            )
        )
    if AUXILIARY in coefficients:
        raise TrainingError(
            Problem(
                f"the objective has a term `{AUXILIARY}`, the name of the model's own loss", remedy="rename the term"
            )
        )


def _check_known(terms: Mapping[str, object], coefficients: Mapping[str, float]) -> None:
    unknown = sorted(set(terms) - set(coefficients))
    if unknown:
        raise TrainingError(
            Problem(
                f"the objective returned the terms {unknown}, its coefficients name {sorted(coefficients)}",
                remedy="give every term a coefficient and a weight",
            )
        )


def _check_complete(counted: Iterable[str], sums: Mapping[str, float]) -> None:
    missing = [name for name in counted if name not in sums]
    if missing:
        raise TrainingError(
            Problem(
                f"the objective never returned the terms {missing}, which have coefficients and weights",
                remedy="return every term from `terms` or `window_terms`, or drop its coefficient",
            )
        )


def _check_finite(weights: Mapping[str, float]) -> None:
    bad = [f"{name} = {weight}" for name, weight in weights.items() if not math.isfinite(weight)]
    if bad:
        raise TrainingError(
            Problem(
                f"the weights of the window are not finite: {', '.join(bad)}",
                remedy="look for NaN or infinite sample, message or token weights in the data",
            )
        )
