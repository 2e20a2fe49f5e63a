"""Which row comes when: a pure function of the seed and the position, so that resuming needs a number only.

Orders come from integer hashing and a stable sort, not from a random generator: they are the same with every version
of every library.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from triptych.core.errors import ConfigError, Problem

_INTERLEAVING = -1
"""Stream number of the order in which data sets take turns; the others are the data sets' own numbers."""


@dataclass(frozen=True)
class _Schedule:
    """One epoch of a weighted mixture: the data set and the row of each draw."""

    datasets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """One pass over the rows of a data set."""

    rows: npt.NDArray[np.int64]
    pieces: npt.NDArray[np.int64]
    """The piece each of them is in, ascending from 0; the rows of a piece belong to one group."""


class Mixture:
    """Draws (data set, row) pairs for an endless sequence of epochs.

    Without weights an epoch is every row of every data set once, in an order of its own. With weights an epoch has as
    many draws; data set i gets its share of them (largest remainder, so the shares are exact in every epoch) and walks
    its own endless sequence of reshuffled permutations, so no row is drawn twice before all are drawn once.

    Rows of one group (about one picture) can be kept together, in pieces of limited size: then pieces are shuffled.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float | None],
        seed: int,
        groups: Callable[[], Sequence[Sequence[int]]] | None = None,
        piece_size: int = 1,
    ) -> None:
        """Args:
            sizes: rows of each data set.
            weights: share of each, of any positive sum; all None for "every row once".
            seed: any integer.
            groups: gives, for each data set, the group number of each row, 0 or more; the same number in several data
                sets is the same group, which without weights they form together. Called when a row is first drawn.
                None: every row by itself.
            piece_size: most rows of a group that follow each other.

        Raises:
            ConfigError: no data set, an empty one, some weights missing, a weight that is not a positive number, or
                one so small that its data set would never be drawn.
        """
        _validate(sizes, weights)
        self._sizes = tuple(sizes)
        self._seed = seed
        self._offsets = np.cumsum((0, *sizes))
        self._find_groups = groups if piece_size > 1 else None
        self._piece_size = piece_size
        self._orders: OrderedDict[tuple[int, int], _Order] = OrderedDict()
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
            flat = int(self._order(_INTERLEAVING, epoch).rows[within])
            dataset = int(np.searchsorted(self._offsets, flat, side="right")) - 1
            return dataset, flat - int(self._offsets[dataset])
        schedule = self._schedule(epoch)
        return int(schedule.datasets[within]), int(schedule.rows[within])

    @cached_property
    def _groups(self) -> list[npt.NDArray[np.int64]] | None:
        return None if self._find_groups is None else [np.asarray(item, np.int64) for item in self._find_groups()]

    def _schedule(self, epoch: int) -> _Schedule:
        schedule = self._schedules.get(epoch)
        if schedule is None:
            schedule = self._schedules[epoch] = self._make_schedule(epoch)
            if len(self._schedules) > 2:
                self._schedules.popitem(last=False)
        return schedule

    def _make_schedule(self, epoch: int) -> _Schedule:
        """Data sets take turns piece by piece, each walking through its own pieces in order."""
        assert self._quotas is not None
        turns = [self._turns(dataset, epoch) for dataset in range(len(self._quotas))]
        lengths = [np.bincount(turn.pieces) for turn in turns]
        owners = np.repeat(np.arange(len(turns)), [len(length) for length in lengths])
        sequence = owners[_shuffle(len(owners), (self._seed, _INTERLEAVING, epoch))]
        datasets = np.empty(self.epoch_length, np.int64)
        rows = np.empty(self.epoch_length, np.int64)
        sizes = np.empty_like(sequence)
        for dataset, length in enumerate(lengths):
            sizes[sequence == dataset] = length
        draws = np.repeat(sequence, sizes)
        for dataset, turn in enumerate(turns):
            datasets[draws == dataset] = dataset
            rows[draws == dataset] = turn.rows
        return _Schedule(datasets, rows)

    def _turns(self, dataset: int, epoch: int) -> _Order:
        """What a data set gives to an epoch: the next rows of its endless sequence."""
        assert self._quotas is not None
        size, first = self._sizes[dataset], epoch * self._quotas[dataset]
        stop = first + self._quotas[dataset]
        rows, pieces, count = [], [], 0
        for cycle in range(first // size, -(-stop // size)):
            order = self._order(dataset, cycle)
            part = slice(max(0, first - cycle * size), min(size, stop - cycle * size))
            rows.append(order.rows[part])
            pieces.append(order.pieces[part] - order.pieces[part][0] + count)
            count = int(pieces[-1][-1]) + 1
        return _Order(np.concatenate(rows), np.concatenate(pieces))

    def _order(self, stream: int, cycle: int) -> _Order:
        key = (stream, cycle)
        order = self._orders.get(key)
        if order is None:
            is_flat = stream == _INTERLEAVING
            size = self.epoch_length if is_flat else self._sizes[stream]
            groups = None
            if self._groups is not None:
                groups = np.concatenate(self._groups) if is_flat else self._groups[stream]
            order = self._orders[key] = _make_order(size, (self._seed, stream, cycle), groups, self._piece_size)
            # Around the end of an epoch two orders of each stream are in use.
            if len(self._orders) > 2 * (len(self._sizes) + 1):
                self._orders.popitem(last=False)
        return order


def _make_order(size: int, key: tuple[int, ...], groups: npt.NDArray[np.int64] | None, piece_size: int) -> _Order:
    rows = _shuffle(size, key)
    if groups is None or len(np.unique(groups)) == size:
        return _Order(rows, np.arange(size))
    # The rows of each group in shuffled order, cut into pieces; then the pieces in shuffled order.
    rows = rows[np.argsort(groups[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[rows], prepend=-1))
    within = np.arange(size) - np.repeat(starts, np.diff(starts, append=size))
    pieces = np.cumsum(within % piece_size == 0) - 1
    places = np.empty(pieces[-1] + 1, np.int64)
    places[_shuffle(len(places), (*key, piece_size))] = np.arange(len(places))
    order = np.argsort(places[pieces], kind="stable")
    return _Order(rows[order], places[pieces][order])


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
