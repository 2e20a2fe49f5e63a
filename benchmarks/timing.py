"""Steps of two ways in turns, in one process: seconds and added peak memory of each, guarded against other load."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import psutil
import torch
from torch import Tensor, nn

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
    gc.collect()
    _give_back()
    is_disturbed = not wait_until_quiet(patience)
    with PeakMemory() as memory:
        start = time.perf_counter()
        way.run()
        if way.optimizer is not None:
            way.optimizer.step()
        seconds = time.perf_counter() - start
    way.model.zero_grad(set_to_none=True)
    return seconds, memory.added, is_disturbed


class PeakMemory:
    """Resident memory of this process while it is entered, looked at every 10 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = 0
        self._peak = 0

    @property
    def added(self) -> int:
        """Bytes at the peak less those at the start."""
        return self._peak - self._before

    def __enter__(self) -> PeakMemory:
        self._before = self._peak = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)


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


def _give_back() -> None:
    """Let the allocator return what is free, so that a step's peak is its own."""
    with contextlib.suppress(OSError, AttributeError):  # another allocator: the base is a little higher for both ways
        ctypes.CDLL("libc.so.6").malloc_trim(0)
