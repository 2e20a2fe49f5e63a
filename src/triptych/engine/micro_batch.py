"""The largest token budget of a micro-batch whose measured memory stays within bounds.

    tokens   L ------- 2L --------------- 4L ---- found
    measured *         *                  *       *        each pass is measured before a larger one is tried

Passes are real: forward and backward of the scorer and the objective over rows of the run, gradients in place as from
the second micro-batch of a step on. Nothing of the run is changed by them, see `untouched_run`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from triptych.core import distributed
from triptych.core.protocols import BatchSource, Objective, Reference
from triptych.core.types import Batch, Progress, Window
from triptych.engine.memory import PeakMemory, available_bytes, limit_bytes
from triptych.engine.parallel import Runtime
from triptych.engine.state import untouched_modes, untouched_random_state
from triptych.engine.step import run_micro_batch
from triptych.engine.window import Feed, Tally, plan_window

MARGIN = 0.9
"""Share of the room that measured passes may fill: a heap in use for many steps holds a little more than one pass."""
_STEP = 1.1
"""A pass that would grow by less is not measured."""
_APART = 0.75
"""Two passes tell how memory grows when one has at most this share of the other's tokens."""
_PREFETCHED = 1
"""Batches whose pixels a source may hold ready beside that of the pass."""


@dataclass(frozen=True)
class Point:
    """A measured pass."""

    tokens: int
    """Tokens that were computed."""
    added: int
    """Bytes it added at its peak."""


@dataclass(frozen=True)
class Room:
    """Memory that a run may add to the loaded model; the same on every rank: the least of any."""

    available: int
    """Bytes there were before the first pass."""
    limit: int
    """Bytes of it that may be used."""
    gradients: int
    """Bytes of one gradient of all that trains."""
    optimizer: int
    """Bytes of the optimizer's state."""

    @property
    def reserved(self) -> int:
        """Bytes that a step holds before its first activation."""
        return self.gradients + self.optimizer

    @property
    def passes(self) -> int:
        """Bytes that the pass of a micro-batch may add; negative where not even the rest has room."""
        return math.floor(MARGIN * (self.limit - self.reserved))


class TooLargeError(Exception):
    """A single row needs more memory than there is room for."""

    def __init__(self, tokens: int, added: float, is_measured: bool) -> None:
        super().__init__(f"{tokens} tokens add {added:.0f} bytes")
        self.tokens = tokens
        self.added = added
        self.is_measured = is_measured


def find_room(scorer: nn.Module, runtime: Runtime, limit: float | str, keeps_master: bool = False) -> Room:
    """Look how much memory there is; every rank must call it, with no gradient in place.

    Args:
        scorer: as `Runtime.wrap` returned it.
        limit: `train.memory_limit`; a size above what is available counts as that, or passes would be tried that end
            in an allocation failure.
        keeps_master: whether the optimizer holds bf16 weights in single precision, too (`bf16_weights: master`).
    """
    gradients = optimizer = 0
    for parameter in scorer.parameters():
        if parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            gradients += local.numel() * local.itemsize
            # AdamW's two running means, in single precision at least.
            optimizer += 2 * local.numel() * max(4, local.itemsize)
            if keeps_master and local.dtype == torch.bfloat16:
                optimizer += 4 * local.numel()
    distributed.barrier()
    available = available_bytes(runtime.device)
    least = -torch.tensor([available, min(limit_bytes(limit, available), available)], device=runtime.device)
    available, allowed = (-distributed.all_reduce_max(least)).tolist()
    return Room(available, allowed, gradients, optimizer)


@dataclass(frozen=True)
class Meter:
    """Measures passes of micro-batches."""

    scorer: nn.Module
    """As `Runtime.wrap` returned it, in the mode it trains in."""
    objective: Objective
    """One that does not couple the samples of a window."""
    source: BatchSource
    """Attaches pixels."""
    reference: Reference | None
    runtime: Runtime

    def measure(self, *batches: Batch) -> int:
        """Bytes that forward and backward over light batches, one after the other, add at their peak, on the rank where
        they add most.

        Leaves gradients in place. Every rank must call it with equal batches, since sharded weights are gathered.
        """
        plan = plan_window(self.objective, Window(0, 0.0, batches), self.runtime, Progress(0, None))
        feed, tally = Feed(self.source, self.reference, self.runtime), Tally(self.objective, plan)
        ahead = _PREFETCHED if self.runtime.device.type == "cpu" else 0
        with PeakMemory(self.runtime.device) as memory:
            for index, batch in enumerate(plan.batches):
                held = [self.source.attach(batch) for _ in range(ahead)]
                # Not the last: gradients are not exchanged, as in all micro-batches of a step but one.
                with self.runtime.synchronise(self.scorer, is_last=False):
                    run_micro_batch(self.scorer, feed, tally, index, batch)
                del held
        return int(distributed.all_reduce_max(torch.tensor(memory.added, device=self.runtime.device)))


@contextmanager
def untouched_run(scorer: nn.Module) -> Iterator[None]:
    """After the passes inside, buffers, modes and random numbers are as before, and no gradient is left."""
    buffers = {name: buffer.detach().clone() for name, buffer in scorer.named_buffers()}
    with untouched_random_state(), untouched_modes(scorer):
        try:
            yield
        finally:
            scorer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in scorer.named_buffers():
                    buffer.copy_(buffers[name])


def climb(lengths: Sequence[int], measure: Callable[[int], int], room: Room) -> list[Point]:
    """Measure single rows from the shortest to the longest, each at most twice as long as the one before where there
    are such rows.

    Args:
        lengths: tokens of rows, ascending, at least one.
        measure: place in `lengths` -> bytes that its row adds.

    Raises:
        TooLargeError: a row adds more than its room, or, as it seems, would add more than is available.
    """
    measure(0)  # what libraries allocate once, and the gradients, belong to no pass
    points: list[Point] = []
    place = 0
    while True:
        points.append(Point(lengths[place], measure(place)))
        if points[-1].added > room.passes:
            raise TooLargeError(lengths[place], points[-1].added, is_measured=True)
        if lengths[place] == lengths[-1]:
            return points
        longer = bisect.bisect_right(lengths, lengths[place])
        place = max(longer, bisect.bisect_right(lengths, 2 * lengths[place]) - 1)
        expected = predict(points, lengths[place])
        if expected > room.available - room.reserved:
            raise TooLargeError(lengths[place], expected, is_measured=False)


def grow(start: Sequence[Point], largest: int, measure: Callable[[int], Point], room: Room) -> tuple[int, list[Point]]:
    """The largest budget whose measured pass stays within its room, and all passes that did.

    No pass computes more than twice the tokens of the one before it, or is expected to leave its room.

    Args:
        start: passes measured within their room, ascending; the tokens of the last are the smallest budget.
        largest: budget that no micro-batch can exceed.
        measure: budget -> the largest pass that it allows.
    """
    budget, points = start[-1].tokens, list(start)
    while budget < largest:
        highest = min(2 * points[-1].tokens, largest)
        choices = range(budget + 1, highest + 1)
        fitting = bisect.bisect_right(choices, room.passes, key=lambda tokens: math.ceil(predict(points, tokens)))
        # Whole rows may fill less than the budget before: what counts is the growth of what is computed.
        if fitting == 0 or budget + fitting < min(_STEP * points[-1].tokens, largest):
            break
        point = measure(budget + fitting)
        if point.added > room.passes:
            break
        budget += fitting
        if point.tokens > points[-1].tokens:
            points.append(point)
    return budget, points


def confirm(budget: int, smallest: int, measure: Callable[[int], int], room: Room) -> Point:
    """The largest budget, not above `budget`, at which several passes one after the other stay within their room.

    On a CPU they need more than one pass does: what a heap has free is in pieces.

    Args:
        smallest: budget of a single row.
        measure: budget -> bytes that passes add.

    Raises:
        TooLargeError: not even the smallest budget has room.
    """
    while (added := measure(budget)) > room.passes:
        if budget == smallest:
            raise TooLargeError(budget, added, is_measured=True)
        budget = max(smallest, min(int(budget * room.passes / added), math.floor(budget / _STEP)))
    return Point(budget, added)


def predict(points: Sequence[Point], tokens: int) -> float:
    """Bytes that a pass over more tokens than the last point's adds at most, if growth is linear or quadratic.

    Memory is a + b n + c n^2 in the number n of tokens, c for attention that keeps its scores. With none of them
    negative, growth is at most that of a + c n^2 through the last point and an earlier one. A single point tells
    nothing of c.

    Args:
        points: measured, in the order of their tokens.
    """
    last = points[-1]
    growth = last.added * (tokens / last.tokens - 1)
    # What lies close to the last differs from it by chance.
    apart = [point for point in points if point.tokens <= _APART * last.tokens]
    if apart:
        squares = (tokens**2 - last.tokens**2) / (last.tokens**2 - apart[-1].tokens ** 2)
        growth = max(growth, (last.added - apart[-1].added) * squares)
    return last.added + growth
