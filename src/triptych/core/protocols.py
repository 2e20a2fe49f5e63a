"""What the folders ask of each other. Structural types: implementations do not inherit from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from triptych.core.types import Batch, Progress, ScoreField, Scores, StepRecord, Window, WindowValues


@runtime_checkable
class Objective(Protocol):
    """Turns scores into numbers to minimise. Never sees a model and never divides: terms are sums.

    The engine minimises `sum(coefficients[t] * terms[t] / W[t])`, W[t] being `weights[t]` added over all micro-batches
    and ranks of the window. A weight that would depend on the model's output must be a constant, the filter going
    into the sum.
    """

    @property
    def needs(self) -> frozenset[ScoreField]:
        """Fields of `Scores` that are read; the scorer computes nothing else."""
        ...

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Term -> factor in the loss. Exactly the terms this objective has."""
        ...

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Term -> 0-d weight of this batch, from the batch alone, before the forward pass."""
        ...

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        """Term -> 0-d *sum* over this batch, differentiable through `scores`; `window` is detached here."""
        ...

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Name -> (0-d sum, 0-d weight), detached; the engine reports sum / weight over the window and ranks."""
        ...


@runtime_checkable
class WindowObjective(Objective, Protocol):
    """An objective that couples the samples of a window, such as a contrastive loss.

    The engine first runs the whole window without gradients, joins what `observe` returns over micro-batches and
    ranks in sample order, and hands it back as `window`. Gradients of `window_terms` with respect to the names in
    `differentiable` are carried back exactly by a second pass (Gao et al. 2021, arXiv 2101.06983). A 0-d tensor is a
    shared parameter: it is not joined and its gradient is applied once per window.
    """

    @property
    def differentiable(self) -> frozenset[str]:
        """Names returned by `observe` that carry gradients."""
        ...

    def observe(self, scores: Scores, batch: Batch) -> Mapping[str, Tensor]:
        """Name -> [rows, ...] of this batch, or 0-d for a shared parameter."""
        ...

    def window_terms(self, batch: Batch, window: WindowValues) -> Mapping[str, Tensor]:
        """Term -> 0-d sum of this batch's share, from the window's values alone."""
        ...

    def window_metrics(self, batch: Batch, window: WindowValues) -> Mapping[str, tuple[Tensor, Tensor]]:
        """As `metrics`, from the window's values."""
        ...


class Scorer(Protocol):
    """An nn.Module around a Hugging Face model: the only thing the engine calls and wraps (DDP, FSDP2)."""

    def __call__(self, batch: Batch) -> Scores:
        """Score a batch whose `pixels` are attached (or that has no pictures)."""
        ...


class BatchSource(Protocol):
    """Gives this rank its windows. Every rank sees the same number of windows, each with at least one batch."""

    @property
    def total_windows(self) -> int | None:
        """Windows of the whole run, None for an endless source."""
        ...

    def windows(self) -> Iterator[Window]:
        """Yield the windows that remain, continuing from the state."""
        ...

    def attach(self, batch: Batch) -> Batch:
        """Return the batch with decoded `pixels`; called just before the forward pass."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Told the metrics of each finished step (adaptive sampling, KL control)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State after the last window that was *yielded*; prefetched work does not count."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly after that window."""
        ...


class Reference(Protocol):
    """A reference model as a value: it adds its numbers to a batch."""

    def attach(self, batch: Batch) -> Batch:
        """Return the batch with `token_values["reference_logprobs"]` [S]; no gradients."""
        ...


class Monitor(Protocol):
    """Watches a run. Called on every rank; one that writes must write on the main rank only."""

    def on_start(self, progress: Progress) -> None:
        """Before the first step of this process."""
        ...

    def on_step(self, record: StepRecord) -> None:
        """After every optimizer step."""
        ...

    def on_evaluation(self, progress: Progress, results: Mapping[str, float]) -> None:
        """After every evaluation."""
        ...

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """After a checkpoint is complete on disk."""
        ...

    def on_end(self, progress: Progress, error: BaseException | None) -> None:
        """After the last step, or when the run stops for `error`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        ...


class Evaluator(Protocol):
    """Measures the model during training."""

    def run(self) -> Mapping[str, float]:
        """Name -> value, equal on every rank."""
        ...


class PictureProcessor(Protocol):
    """What `data` must know of a model's vision side; implemented in `models`, handed over by `stages`."""

    @property
    def placeholder(self) -> str:
        """The text that stands for one picture in this model's chat template, e.g. `<image>`."""
        ...

    def token_ids(self, width: int, height: int) -> list[int]:
        """Token ids that one picture of this size becomes, markers included; replaces the placeholder at id level."""
        ...

    def wanted_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a picture of this size is first resized to: pixels beyond it are not needed.

        The size itself where the picture is not resized, or where it is not known what it is resized to.
        """
        ...

    def pixels(
        self, pictures: Sequence[Image.Image], sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Tensor]:
        """Vision inputs for RGB pictures, in order, by the model's own argument names.

        Those of several pictures are what `join_pixels` makes of those of each. May be called by several threads.

        Args:
            pictures: at least one.
            sizes: (width, height) of each as it is stored, where it was decoded at a smaller one: what it becomes has
                the shape, and so the number of tokens, of the stored picture. None: the sizes they have.
        """
        ...


class FeatureStore(Protocol):
    """Keeps what a frozen vision tower makes of pictures."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors of a picture, on the CPU; None where it is not known."""
        ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember a picture, where there is room."""
        ...


def join_pixels(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join along the first dimension; where others differ (pictures with fewer tiles), zeros are added behind.

    Args:
        parts: vision inputs by name, each [n, ...] and all with the same names; at least one. A single one's tensors
            come back as they are.
    """
    if len(parts) == 1:
        return dict(parts[0])
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    inner = [tensor.shape[1:] for tensor in tensors]
    if len(set(inner)) == 1:
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*inner, strict=True)]
    joined = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *largest)
    start = 0
    for tensor in tensors:
        place = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        joined[place] = tensor
        start += len(tensor)
    return joined
