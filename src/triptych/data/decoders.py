"""Threads that decode pictures, and how many of them."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

from triptych.core import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Batches that each number of threads is tried on."""
TOLERANCE = 1.1
"""How much slower than the fastest a smaller number of threads may be and still be taken."""


class Decoders:
    """Runs one function over many items in threads, in order.

    Left to choose, it runs the first batches with 1, 2, 4, ... threads in turn, up to the processors of this process,
    and from then on with what was fastest. So the choice costs nothing, and is made under the load of the training
    itself; what comes out is the same all along. A run that ends before has lost nothing either.
    """

    def __init__(
        self,
        threads: int | Literal["auto"],
        processors: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        threads: how many, or `auto`.
        processors: most threads that `auto` tries; None: those of this process, shared with the other processes of this
            machine that take part in the run.
        clock: seconds.
        """
        self._clock = clock
        candidates = [threads] if threads != "auto" else _powers(processors or usable_processors())
        self.trials: dict[int, list[float]] = {count: [] for count in candidates}
        """Number of threads -> seconds a picture of each batch tried."""
        self._pool: ThreadPoolExecutor | None = None
        self._threads: int | None = None
        if len(candidates) == 1:
            self._settle(candidates[0])

    @property
    def threads(self) -> int | None:
        """How many threads were chosen; None as long as they are tried."""
        return self._threads

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The results in the order of the items; raises what the first item that fails raises."""
        if self._pool is not None:
            return list(self._pool.map(work, items))
        count = min(self.trials, key=lambda candidate: len(self.trials[candidate]))
        start = self._clock()
        with ThreadPoolExecutor(count, "triptych-decode") as pool:
            results = list(pool.map(work, items))
        self.trials[count].append((self._clock() - start) / len(items))
        if all(len(trials) >= ROUNDS for trials in self.trials.values()):
            self._choose()
        return results

    def _choose(self) -> None:
        seconds = {count: statistics.median(trials) for count, trials in self.trials.items()}
        chosen = min(count for count in seconds if seconds[count] <= TOLERANCE * min(seconds.values()))
        figures = ", ".join(f"{count}: {1000 * value:.1f}" for count, value in seconds.items())
        if distributed.is_main():
            logger.info("pictures are decoded by %d threads (milliseconds a picture by threads: %s)", chosen, figures)
        self._settle(chosen)

    def _settle(self, count: int) -> None:
        self._threads = count
        self._pool = ThreadPoolExecutor(count, "triptych-decode")


def usable_processors() -> int:
    """Processors for this process: those it may run on, over the processes that the launcher started beside it."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`, which is the last."""
    powers = [2**exponent for exponent in range(limit.bit_length()) if 2**exponent < limit]
    return [*powers, limit]
