"""What to say, and to leave on disk, when a run has to stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from triptych.core import distributed
from triptych.core.errors import Problem, TrainingError
from triptych.core.types import Origin, ParameterGroup, Window
from triptych.engine.window import WindowResult

NOTE = "non-finite.json"
"""Name of the note inside the output folder."""

_SHOWN = 20
"""Samples, or parameters of a group, named in an error."""


@dataclass(frozen=True)
class GradientStatistics:
    """The gradient of one parameter; numbers over its finite entries."""

    mean: float
    std: float
    """Population standard deviation: 0 for a single number."""
    max_abs: float
    norm: float
    """L2 norm."""
    num_non_finite: int


def gradient_statistics(parameters: Mapping[str, nn.Parameter]) -> dict[str, GradientStatistics]:
    """Statistics of every gradient there is; one transfer from the device. Every rank must call it.

    Call it after the fp16 scale is divided out and before gradients are clipped or cleared.
    """
    rows = {name: _statistics(item.grad) for name, item in parameters.items() if item.grad is not None}
    numbers = torch.stack(list(rows.values())).tolist() if rows else []
    return {
        name: GradientStatistics(mean, std, max_abs, norm, int(count))
        for name, (mean, std, max_abs, norm, count) in zip(rows, numbers, strict=True)
    }


def non_finite_error(
    step: int, window: Window, result: WindowResult, groups: Sequence[ParameterGroup], output: Path
) -> TrainingError:
    """Write the note and make the error for a window whose loss or gradient is not finite. Every rank must call it.

    Args:
        step: Steps taken so far; the window would have been the next.
        window: This rank's window; the samples of all ranks are named, those of bad micro-batches alone if known.
        result: What the window gave.
        groups: Groups whose parameters still hold the unclipped gradients.
        output: Folder of the run.
    """
    everywhere = _samples_everywhere(window)
    bad = [origin for item in result.non_finite for origin in item.origins]
    samples = list(dict.fromkeys(bad or everywhere))
    statistics = gradient_statistics({name: item for group in groups for name, item in group.parameters.items()})
    broken = {name: item for name, item in statistics.items() if item.num_non_finite}
    path = output / NOTE
    if distributed.is_main():
        note = {
            "step": step,
            "loss": str(result.loss),
            "terms": {name: str(value) for name, value in result.terms.items()},
            "samples": [asdict(origin) for origin in samples],
            "gradients": {name: asdict(item) for name, item in broken.items()},
        }
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note, indent=2), encoding="utf-8")
    what = f"loss is {result.loss}" if result.non_finite else f"loss is {result.loss:.6g} but gradients are not finite"
    return TrainingError([_headline(step, what, broken, groups, path), *_name_samples(samples, f", see {NOTE}")])


def empty_window_error(step: int, window: Window) -> TrainingError:
    """The error for a window in which nothing has weight. Every rank must call it.

    Args:
        step: Steps taken so far; the window would have been the next.
        window: This rank's window; the samples of all ranks are named.
    """
    samples = _samples_everywhere(window)
    headline = Problem(
        f"step {step + 1}: every term of the loss has weight 0 in this window of {len(samples)} samples,"
        " so there is nothing to learn from it",
        remedy="look at what is supervised in the samples below and at their weights: `triptych check`",
    )
    return TrainingError([headline, *_name_samples(samples)])


class GradientReach:
    """Sees to it that a gradient reaches every trainable parameter once.

    A parameter that none reaches is trained by nobody. A window without pictures may wait for one that has some, since
    nothing of the vision side learns from text alone; after `PATIENCE` windows, and at the end of a shorter run, a
    parameter must have been reached. One that was is done with: the gradients of a trained model may vanish.
    """

    PATIENCE = 20

    def __init__(
        self, check: Callable[[Mapping[str, nn.Parameter]], list[str]], groups: Sequence[ParameterGroup]
    ) -> None:
        self._check = check
        self._groups = groups
        self._parameters = {name: item for group in groups for name, item in group.parameters.items()}
        self.unreached = list(self._parameters)
        """Names of the parameters that no window so far has reached; what must survive a resume."""

    def look(self, step: int, window: Window, result: WindowResult) -> None:
        """Look at the gradients of a window. Every rank must call it.

        Raises:
            TrainingError: names the parameters that no window so far has reached.
        """
        if not self.unreached or not any(result.weights.values()):
            return
        names = set(self._check(self._parameters))
        self.unreached = [name for name in self.unreached if name in names]
        has_pictures = any(distributed.all_gather_objects(any(batch.images for batch in window.batches)))
        if has_pictures or step + 1 >= self.PATIENCE:
            self.finish()

    def finish(self) -> None:
        """Nothing more is waited for.

        Raises:
            TrainingError: names the parameters that no window has reached.
        """
        if not self.unreached:
            return
        headline = Problem(
            f"no gradient reaches {len(self.unreached)} trainable parameters",
            key="tuning",
            remedy="freeze them with a tuning rule, train on data that uses them (pictures for the vision side), or"
            " mend the model so that the loss depends on them",
        )
        waiting = set(self.unreached)
        raise TrainingError([headline, *(item for group in self._groups for item in _name_unreached(group, waiting))])


def _headline(
    step: int,
    what: str,
    broken: Mapping[str, GradientStatistics],
    groups: Sequence[ParameterGroup],
    path: Path,
) -> Problem:
    counts = {group.name: len(broken.keys() & group.parameters.keys()) for group in groups}
    where = ", ".join(
        f"{group.name} ({counts[group.name]} of {len(group.parameters)})" for group in groups if counts[group.name]
    )
    first = f", first {next(iter(broken))}" if broken else ""
    return Problem(
        f"step {step + 1}: {what}; the weights are untouched. Non-finite gradients: {where or 'none'}{first}",
        file=str(path),
        remedy="look at the samples below, lower the learning rate, or use bf16 or fp32 instead of fp16",
    )


def _name_unreached(group: ParameterGroup, unreached: Set[str]) -> list[Problem]:
    """One problem for a group that has some, none otherwise."""
    names = [name for name in group.parameters if name in unreached]
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    text = f"group {group.name}: {len(names)} of {len(group.parameters)}: {', '.join(names[:_SHOWN])}{more}"
    return [Problem(text)]


def _samples_everywhere(window: Window) -> list[Origin]:
    """The samples of the window on all ranks."""
    here = [origin for batch in window.batches if not batch.is_padding for origin in batch.origins]
    return [origin for origins in distributed.all_gather_objects(list(dict.fromkeys(here))) for origin in origins]


def _name_samples(samples: Sequence[Origin], see: str = "") -> list[Problem]:
    named = [Problem(f"sample {origin.id} of the window", file=origin.file, line=origin.line) for origin in samples]
    if len(named) > _SHOWN:
        return [*named[:_SHOWN], Problem(f"and {len(named) - _SHOWN} more samples{see}")]
    return named


def _statistics(gradient: Tensor) -> Tensor:
    """[5] mean, std, max_abs, norm, count of non-finite entries."""
    full = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().double()
    finite = full.isfinite()
    values = full[finite]
    if values.numel() == 0:
        values = full.new_zeros(1)
    count = (~finite).sum().double()
    return torch.stack([values.mean(), values.std(correction=0), values.abs().max(), values.norm(), count])
