"""Steps of two ways in turns: seconds and added peak memory of each, guarded against other load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from triptych.engine.memory import PeakMemory

LOOK = 0.01
"""Seconds between two looks at the resident memory."""
QUIET = 0.08
"""Share of the processors that other processes may use while a step is timed."""
PATIENCE = 60.0
"""Seconds to wait for that, after which the step is timed all the same and counted as disturbed."""


@dataclass(frozen=True)
class Way:
    """One way to take the step."""

    name: str
    run: Callable[[], Tensor]
    """Forward and backward; returns the loss. Gradients are left in `.grad`."""
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None


class Runner(Protocol):
    """Takes the steps of a way, in this process or in one of its own."""

    def take(self, looks_at_memory: bool) -> Step:
        """Take a step."""


@dataclass(frozen=True)
class Step:
    """What a step cost."""

    seconds: float
    is_disturbed: bool
    """Whether others used the processors meanwhile."""
    added: int | None
    """Bytes of resident memory at its peak, less those before it, if it was looked at."""


@dataclass
class Timing:
    """What was measured of a way."""

    seconds: list[float] = field(default_factory=list)
    added: int = 0
    """Bytes of resident memory at the peak of a step, less those before it."""
    disturbed: int = 0
    """Steps before or during which others used the processors."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def interleave(
    runners: Mapping[str, Runner], repeats: int, warm_up: int = 1, patience: float = PATIENCE
) -> dict[str, Timing]:
    """Take the steps of all ways in turns, their order turned round each time.

    The last turn looks at memory: what is free is given back to the system before it, which makes the step slower.

    Args:
        repeats: timed turns.
        warm_up: turns before, which also make the optimizers' state.
        patience: seconds to wait for a quiet machine before each step.
    """
    timings = {name: Timing() for name in runners}
    for turn in range(warm_up + repeats):
        for name in runners if turn % 2 == 0 else reversed(list(runners)):
            was_quiet = wait_until_quiet(patience)
            step = runners[name].take(looks_at_memory=turn == warm_up + repeats - 1)
            if turn >= warm_up:
                timings[name].seconds.append(step.seconds)
                timings[name].disturbed += step.is_disturbed or not was_quiet
                timings[name].added = step.added or 0
    return timings


class Local:
    """Steps in this process."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._device = next((item.device for item in way.model.parameters()), torch.device("cpu"))

    def take(self, looks_at_memory: bool) -> Step:
        """Take a step; what is free is given back before memory is looked at."""
        self._free()
        memory = PeakMemory(self._device, LOOK)
        with memory if looks_at_memory else nullcontext():
            others = _Others()
            start = time.perf_counter()
            self._step()
            seconds = time.perf_counter() - start
            is_disturbed = others.share() > QUIET
        self._free()
        return Step(seconds, is_disturbed, memory.added if looks_at_memory else None)

    def _step(self) -> None:
        self._way.run()
        if self._way.optimizer is not None:
            self._way.optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _free(self) -> None:
        self._way.model.zero_grad(set_to_none=True)


def wait_until_quiet(patience: float = PATIENCE) -> bool:
    """Whether other processes left the processors alone within so many seconds."""
    end = time.monotonic() + patience
    while True:
        others = _Others()
        time.sleep(0.2)
        if others.share() <= QUIET:
            return True
        if time.monotonic() > end:
            return False


class _Others:
    """What other processes use of the processors from now on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._read()

    def share(self) -> float:
        """Of all processors' time since the start."""
        wall, busy, own = (after - before for after, before in zip(self._read(), self._before, strict=True))
        return (busy - own) / (wall * (psutil.cpu_count() or 1))

    def _read(self) -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), self._process.cpu_times()
        return time.monotonic(), times.user + times.nice + times.system, own.user + own.system
