"""Steps of two ways in turns: seconds and added peak memory of each, guarded against other load."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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

    def take(self) -> Step:
        """Take a step."""

    def look_at_memory(self) -> int:
        """Take a step and look at the bytes it adds at its peak."""


@dataclass(frozen=True)
class Step:
    """What a step cost."""

    seconds: float
    is_disturbed: bool
    """Whether others used the processors meanwhile."""


@dataclass
class Timing:
    """What was measured of a way."""

    seconds: list[float] = field(default_factory=list)
    added: int = 0
    """Bytes of resident memory at the peak of a step, less those before it; 0 where it was not looked at."""
    disturbed: int = 0
    """Steps before or during which others used the processors."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def turn_ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """How many times as fast ours was in each turn, from both ways' seconds.

    What slows the machine for longer than a step slows both steps of a turn, and leaves their ratio mostly alone.
    """
    return [second / first for first, second in zip(ours, peer, strict=True)]


@dataclass(frozen=True)
class Turns:
    """How often each way takes its timed step."""

    least: int
    most: int
    seconds: float = math.inf
    """No turn beyond the least is begun that would not end within so many, if it takes as long as those before it."""

    def wants(self, taken: int, spent: float) -> bool:
        """Whether one more is taken after so many, which took so many seconds."""
        return taken < self.least or (taken < self.most and spent * (taken + 1) / taken <= self.seconds)


def interleave(
    runners: Mapping[str, Runner],
    turns: Turns,
    warm_up: int = 1,
    looks_at_memory: bool = True,
    patience: float = PATIENCE,
) -> dict[str, Timing]:
    """Take the steps of all ways in turns, their order turned round each time.

    Memory has steps of its own, which are not timed: before them, what is free is given back to the system.

    Args:
        warm_up: turns before, which also make the optimizers' state.
        patience: seconds to wait for a quiet machine before each timed step.
    """
    timings = {name: Timing() for name in runners}
    for _ in range(warm_up):
        for runner in runners.values():
            runner.take()
    if looks_at_memory:
        for name, runner in runners.items():
            timings[name].added = runner.look_at_memory()
    taken, spent = 0, 0.0
    while turns.wants(taken, spent):
        for name in runners if taken % 2 == 0 else reversed(list(runners)):
            was_quiet = wait_until_quiet(patience)
            step = runners[name].take()
            timings[name].seconds.append(step.seconds)
            timings[name].disturbed += step.is_disturbed or not was_quiet
            spent += step.seconds
        taken += 1
    return timings


class Local:
    """Steps in this process."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._device = next((item.device for item in way.model.parameters()), torch.device("cpu"))

    def take(self) -> Step:
        """Take a step."""
        self._free()
        others = _Others()
        start = time.perf_counter()
        self._step()
        seconds = time.perf_counter() - start
        is_disturbed = others.share() > QUIET
        self._free()
        return Step(seconds, is_disturbed)

    def look_at_memory(self) -> int:
        """Bytes that a step adds at its peak; what is free is given back before it."""
        self._free()
        with PeakMemory(self._device, LOOK) as memory:
            self._step()
        self._free()
        return memory.added

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
