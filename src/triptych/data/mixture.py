"""Which row comes when: a pure function of the seed and the position, so that resuming needs a number only.

Orders come from integer hashing and a stable sort, not from a random generator: they are the same with every version
of every library.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from triptych.core.errors import ConfigError, Problem

_INTERLEAVING = -1
"""Stream number of the order in which data sets take turns; the others are the data sets' own numbers."""


@dataclass(frozen=True)
class _Schedule:
    """One epoch of a weighted mixture: whose turn it is, and which of its own turns of this epoch that is."""

    datasets: npt.NDArray[np.int64]
    turns: npt.NDArray[np.int64]


class Mixture:
    """Draws (data set, row) pairs for an endless sequence of epochs.

    Without weights an epoch is every row of every data set once, in an order of its own. With weights an epoch has as
    many draws; data set i gets its share of them (largest remainder, so the shares are exact in every epoch) and walks
    its own endless sequence of reshuffled permutations, so no row is drawn twice before all are drawn once.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> None:
        """Args:
            sizes: rows of each data set.
            weights: share of each, of any positive sum; all None for "every row once".
            seed: any integer.

        Raises:
            ConfigError: no data set, an empty one, some weights missing, a weight that is not a positive number, or
                one so small that its data set would never be drawn.
        """
        _validate(sizes, weights)
        self._sizes = tuple(sizes)
        self._seed = seed
        self._offsets = np.cumsum((0, *sizes))
        self._permutations: OrderedDict[tuple[int, int, int], npt.NDArray[np.int64]] = OrderedDict()
        self._schedules: OrderedDict[int, _Schedule] = OrderedDict()
        given = [weight for weight in weights if weight is not None]
        self._quotas = _apportion(self.epoch_length, given) if given else None
        for index, quota in enumerate(self._quotas or ()):
            if quota == 0:
                raise ConfigError(
                    Problem(
                        f"weight {weights[index]} gives data set {index + 1} no row of an epoch of {self.epoch_length}",
                        key=f"data[{index}].weight",
                        remedy="raise the weight or drop the data set",
                    )
                )

    @property
    def epoch_length(self) -> int:
        """Draws of one epoch: the rows of all data sets together."""
        return sum(self._sizes)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Draws of each data set in one epoch."""
        return self._quotas or self._sizes

    def draw(self, position: int) -> tuple[int, int]:
        """(data set, row) at a position, 0-based and counted over all epochs."""
        epoch, within = divmod(position, self.epoch_length)
        if self._quotas is None:
            flat = int(self._permutation(_INTERLEAVING, epoch, self.epoch_length)[within])
            dataset = int(np.searchsorted(self._offsets, flat, side="right")) - 1
            return dataset, flat - int(self._offsets[dataset])
        schedule = self._schedule(epoch)
        dataset = int(schedule.datasets[within])
        turn = epoch * self._quotas[dataset] + int(schedule.turns[within])
        cycle, step = divmod(turn, self._sizes[dataset])
        return dataset, int(self._permutation(dataset, cycle, self._sizes[dataset])[step])

    def _schedule(self, epoch: int) -> _Schedule:
        schedule = self._schedules.get(epoch)
        if schedule is None:
            assert self._quotas is not None
            owners = np.repeat(np.arange(len(self._quotas)), self._quotas)
            datasets = owners[self._permutation(_INTERLEAVING, epoch, self.epoch_length)]
            turns = np.empty_like(datasets)
            for dataset, quota in enumerate(self._quotas):
                turns[datasets == dataset] = np.arange(quota)
            schedule = self._schedules[epoch] = _Schedule(datasets, turns)
            if len(self._schedules) > 2:
                self._schedules.popitem(last=False)
        return schedule

    def _permutation(self, stream: int, cycle: int, size: int) -> npt.NDArray[np.int64]:
        key = (stream, cycle, size)
        order = self._permutations.get(key)
        if order is None:
            order = self._permutations[key] = _shuffle(size, (self._seed, stream, cycle))
            # Around the end of an epoch two orders of each stream are in use.
            if len(self._permutations) > 2 * (len(self._sizes) + 1):
                self._permutations.popitem(last=False)
        return order


def _shuffle(size: int, key: Sequence[int]) -> npt.NDArray[np.int64]:
    """A permutation of range(size): the order of one hash per number."""
    state = np.uint64(0)
    for number in key:
        state = _mix(np.array([(int(state) + number) % 2**64], dtype=np.uint64))[0]
    with np.errstate(over="ignore"):
        hashes = _mix(np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state)
    return np.argsort(hashes, kind="stable")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 15), with its increment."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _apportion(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Split `total` in proportion to `weights` by largest remainder; ties go to the earlier data set."""
    shares = [Fraction(weight) for weight in weights]
    exact = [total * share / sum(shares) for share in shares]
    quotas = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (quotas[index] - exact[index], index))
    for index in by_remainder[: total - sum(quotas)]:
        quotas[index] += 1
    return tuple(quotas)


def _validate(sizes: Sequence[int], weights: Sequence[float | None]) -> None:
    problems = []
    if not sizes:
        problems.append(Problem("there is no data set", key="data", remedy="add at least one data set"))
    for index, size in enumerate(sizes):
        if size <= 0:
            problems.append(Problem(f"data set {index + 1} has no rows", key=f"data[{index}]", remedy="drop it"))
    assert len(sizes) == len(weights), "one weight (or None) for each data set"
    missing = [index for index, weight in enumerate(weights) if weight is None]
    if missing and len(missing) < len(weights):
        names = ", ".join(str(index + 1) for index in missing)
        problems.append(
            Problem(
                f"{len(weights) - len(missing)} of {len(weights)} data sets have a weight, but not data set {names}",
                key=f"data[{missing[0]}].weight",
                remedy="give every data set a weight, or none",
            )
        )
    for index, weight in enumerate(weights):
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            problems.append(
                Problem(f"weight {weight} is not a positive number", key=f"data[{index}].weight", remedy="use > 0")
            )
    if problems:
        raise ConfigError(problems)
