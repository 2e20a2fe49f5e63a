"""The step for objectives that couple the samples of a window: exact gradients at the memory of one micro-batch.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): a pass without gradients gathers what the objective observes, the
loss is differentiated with respect to those values, and a second pass carries these gradients into the model. Where
every rank has a single micro-batch its graph is kept, and the second forward pass falls away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from triptych.core import distributed
from triptych.core.errors import Problem, TrainingError
from triptych.core.protocols import WindowObjective
from triptych.core.types import Batch, Scores, WindowValues
from triptych.engine.window import Feed, Tally, anchor, micro_batch_terms


def run_cached_window(scorer: nn.Module, objective: WindowObjective, feed: Feed, tally: Tally) -> None:
    """Run both passes over the window of `tally.plan` and leave the gradients in `.grad`.

    Raises:
        TrainingError: the micro-batches of a window observe different names.
    """
    batches = tally.plan.batches
    keep_graph = len(batches) == 1
    observations: list[_Observation] = []
    for index, batch in enumerate(batches):
        with feed.runtime.synchronise(scorer, is_last=index == len(batches) - 1):
            observation = _observe(scorer, objective, feed, batch, keep_graph)
        tally.add_observed(index, observation.values)
        observations.append(observation)
    window = _join(observations, objective.differentiable)
    if not keep_graph:
        # The joined copy is the one in use; a large window would otherwise be held twice.
        observations = [replace(observation, values={}) for observation in observations]
    for index, observation in enumerate(observations):
        if not observation.batch.is_padding:
            _differentiate(objective, tally, index, observation.batch, window.view(index, detached=False))
    gradients = window.gradients()
    for index, batch in enumerate(batches):
        with feed.runtime.synchronise(scorer, is_last=index == len(batches) - 1):
            observation = observations[index]
            if not keep_graph:
                observation = _recompute(scorer, objective, feed, batch, observation)
            loss = _surrogate(observation, window, gradients, index)
            share = micro_batch_terms(
                tally, index, observation.live_scores, observation.batch, window.view(index, detached=True)
            )
            feed.runtime.backward(loss if share is None else loss + share)
            # Frees the graph of this micro-batch before the next one builds its own.
            del observation, loss, share


def measure_joined(scorer: nn.Module, objective: WindowObjective, feed: Feed, tally: Tally) -> None:
    """Terms and metrics of the window without gradients; scores are small and kept, so one pass is enough."""
    observations = [_observe(scorer, objective, feed, batch, keep_scores=True) for batch in tally.plan.batches]
    window = _join(observations, frozenset())
    for index, observation in enumerate(observations):
        batch, view = observation.batch, window.view(index, detached=True)
        tally.add_observed(index, observation.values)
        if not batch.is_padding:
            _differentiate(objective, tally, index, batch, view)
            micro_batch_terms(tally, index, observation.live_scores, batch, view)


@dataclass(frozen=True)
class _Observation:
    """What the first pass keeps of a micro-batch."""

    batch: Batch
    """On the device, without pixels, with the reference model's numbers."""
    values: Mapping[str, Tensor]
    """What the objective observed; no rows for a padding batch."""
    random_state: tuple[Tensor, ...]
    """Generator states before the forward pass, so that the second one draws the same dropout masks."""
    scores: Scores | None
    """With their graph, where it was kept or recomputed."""

    @property
    def live_scores(self) -> Scores:
        """The scores of the pass that has gradients."""
        assert self.scores is not None
        return self.scores


@dataclass(frozen=True)
class _JoinedWindow:
    """The values of the window on all ranks, and where each local micro-batch stands in them."""

    values: Mapping[str, Tensor]
    """Name -> leaf tensor, equal on every rank; those of differentiable names gather gradients."""
    starts: tuple[Mapping[str, int], ...]
    """For each local micro-batch."""
    counts: tuple[Mapping[str, int], ...]
    """For each local micro-batch."""

    def view(self, index: int, detached: bool) -> WindowValues:
        """What the objective sees of the window with micro-batch `index`."""
        values = {name: value.detach() for name, value in self.values.items()} if detached else self.values
        return WindowValues(values, self.starts[index], self.counts[index])

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the whole window's loss by name: the sum of the shares of all ranks. Can be taken once."""
        result: dict[str, Tensor] = {}
        for name, value in self.values.items():
            if value.requires_grad:
                local = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = None
                result[name] = distributed.all_reduce_sum(local) if distributed.is_distributed() else local
        return result


def _observe(
    scorer: nn.Module, objective: WindowObjective, feed: Feed, batch: Batch, keep_scores: bool
) -> _Observation:
    batch = feed.prepare(batch)
    device = feed.runtime.device
    random_state = (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))
    with torch.set_grad_enabled(keep_scores and torch.is_grad_enabled()):
        with feed.runtime.autocast():
            scores = scorer(batch)
        values = _values(objective, scores, batch)
    return _Observation(
        replace(batch, pixels=None, picture_inputs=None), values, random_state, scores if keep_scores else None
    )


def _recompute(
    scorer: nn.Module, objective: WindowObjective, feed: Feed, light: Batch, first: _Observation
) -> _Observation:
    """Repeat the forward pass with gradients. The generators end where the first pass left them."""
    attached = feed.attach(light)
    batch = replace(first.batch, pixels=attached.pixels, picture_inputs=attached.picture_inputs)
    torch.set_rng_state(first.random_state[0])
    if len(first.random_state) > 1:
        torch.cuda.set_rng_state(first.random_state[1], feed.runtime.device)
    with feed.runtime.autocast():
        scores = scorer(batch)
    return replace(first, values=_values(objective, scores, batch), scores=scores)


def _values(objective: WindowObjective, scores: Scores, batch: Batch) -> dict[str, Tensor]:
    values = objective.observe(scores, batch)
    rows = {name: value[:0] if batch.is_padding and value.ndim else value for name, value in values.items()}
    return dict(sorted(rows.items()))


def _join(observations: list[_Observation], differentiable: frozenset[str]) -> _JoinedWindow:
    names = tuple(observations[0].values)
    for observation in observations:
        if tuple(observation.values) != names:
            raise TrainingError(
                Problem(
                    f"micro-batches of one window observe {list(names)} and {list(observation.values)}",
                    remedy="`observe` must return the same names for every batch",
                )
            )
    values: dict[str, Tensor] = {}
    starts: list[dict[str, int]] = [{} for _ in observations]
    counts: list[dict[str, int]] = [{} for _ in observations]
    for name in names:
        parts = [observation.values[name].detach() for observation in observations]
        if parts[0].ndim == 0:
            values[name] = parts[0].clone()
        else:
            values[name], position = distributed.all_gather_rows(torch.cat(parts))
            for index, part in enumerate(parts):
                starts[index][name], counts[index][name] = position, part.shape[0]
                position += part.shape[0]
        values[name].requires_grad_(name in differentiable)
    return _JoinedWindow(values, tuple(starts), tuple(counts))


def _differentiate(objective: WindowObjective, tally: Tally, index: int, batch: Batch, window: WindowValues) -> None:
    """Add this micro-batch's share to the gradients of the window's values."""
    terms = objective.window_terms(batch, window)
    tally.add_terms(index, terms)
    tally.add_metrics(objective.window_metrics(batch, window))
    share = tally.plan.loss(terms)
    if share is not None and share.requires_grad:
        share.backward()


def _surrogate(observation: _Observation, window: _JoinedWindow, gradients: Mapping[str, Tensor], index: int) -> Tensor:
    """0-d number whose gradient is this micro-batch's part of the chain rule.

    Every micro-batch of every rank sees a shared (0-d) parameter, so its gradient is handed out in equal parts.
    """
    loss = anchor(observation.live_scores)
    occurrences = len(window.starts) * distributed.world_size()
    for name, gradient in gradients.items():
        value = observation.values[name]
        if value.ndim == 0:
            loss = loss + (value * gradient / occurrences).double()
        else:
            rows = gradient.narrow(0, window.starts[index][name], window.counts[index][name])
            loss = loss + (value * rows).sum().double()
    return loss
