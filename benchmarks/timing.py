"""Steps of two ways in turns, in one process: seconds and added peak memory of each, guarded against other load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass
class Timing:
    """What was measured of a way."""

    seconds: list[float] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    """Bytes of resident memory at the peak of a step, less those before it."""
    disturbed: int = 0
    """Steps during which others used the processors."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float:
        """Bytes a step adds."""
        return statistics.median(self.added)


def interleave(ways: Sequence[Way], repeats: int, warm_up: int = 1, patience: float = PATIENCE) -> dict[str, Timing]:
    """Take the steps of all ways in turns, their order turned round each time.

    Args:
        repeats: timed turns.
        warm_up: turns before, which also make the optimizers' state.
        patience: seconds to wait for a quiet machine before each step.
    """
    timings = {way.name: Timing() for way in ways}
    for turn in range(warm_up + repeats):
        for way in ways if turn % 2 == 0 else reversed(ways):
            seconds, added, is_disturbed = _take_step(way, patience)
            if turn >= warm_up:
                timing = timings[way.name]
                timing.seconds.append(seconds)
                timing.added.append(added)
                timing.disturbed += is_disturbed
    return timings


def _take_step(way: Way, patience: float) -> tuple[float, int, bool]:
    way.model.zero_grad(set_to_none=True)
    is_disturbed = not wait_until_quiet(patience)
    with PeakMemory(torch.device("cpu"), LOOK) as memory:
        start = time.perf_counter()
        way.run()
        if way.optimizer is not None:
            way.optimizer.step()
        seconds = time.perf_counter() - start
    way.model.zero_grad(set_to_none=True)
    return seconds, memory.added, is_disturbed


def wait_until_quiet(patience: float = PATIENCE) -> bool:
    """Whether other processes left the processors alone within so many seconds."""
    end = time.monotonic() + patience
    own = psutil.Process()
    count = psutil.cpu_count() or 1
    while True:
        before, own_before = psutil.cpu_times(), sum(own.cpu_times()[:2])
        start = time.monotonic()
        time.sleep(0.2)
        after, own_after = psutil.cpu_times(), sum(own.cpu_times()[:2])
        busy = (after.user + after.system) - (before.user + before.system) - (own_after - own_before)
        if busy <= QUIET * count * (time.monotonic() - start):
            return True
        if time.monotonic() > end:
            return False
