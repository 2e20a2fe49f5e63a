"""Mixtures: exact shares, every row before any twice, and nothing but seed and position decides."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.core.errors import ConfigError
from triptych.data.mixture import Mixture

_SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(_SIZES, st.integers(), st.integers(0, 3))
def test_without_weights_an_epoch_is_every_row_once(sizes: list[int], seed: int, epoch: int) -> None:
    mixture = Mixture(sizes, [None] * len(sizes), seed)
    length = mixture.epoch_length
    drawn = [mixture.draw(epoch * length + position) for position in range(length)]
    assert sorted(drawn) == [(dataset, row) for dataset, size in enumerate(sizes) for row in range(size)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(3, 12), st.floats(0.3, 3)), min_size=1, max_size=4), st.integers())
def test_with_weights_shares_are_exact_and_rows_are_spread_evenly(pairs: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [size for size, _ in pairs], [weight for _, weight in pairs]
    mixture = Mixture(sizes, weights, seed)
    length = mixture.epoch_length
    rows: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        drawn = [mixture.draw(epoch * length + position) for position in range(length)]
        rows.update(drawn)
        shares = Counter(dataset for dataset, _ in drawn)
        for dataset, weight in enumerate(weights):
            assert abs(shares[dataset] - length * weight / sum(weights)) < 1
        for dataset, size in enumerate(sizes):  # never twice before all once
            counts = [rows[dataset, row] for row in range(size)]
            assert max(counts) - min(counts) <= 1


def test_largest_remainder_by_hand() -> None:
    # 10 draws in the ratio 5 : 3 : 1 are 5.56, 3.33, 1.11: floors 5, 3, 1 and the tenth goes to the largest remainder.
    assert Mixture([5, 3, 2], [5, 3, 1], seed=0).quotas == (6, 3, 1)
    # A data set may be drawn more often than it has rows.
    mixture = Mixture([9, 1], [0.5, 0.5], seed=0)
    assert Counter(mixture.draw(position) for position in range(10))[1, 0] == 5


@pytest.mark.requirement("A-33")
@given(st.booleans(), st.integers(0, 2**63), st.permutations(range(40)))
def test_a_draw_depends_on_seed_and_position_only(is_weighted: bool, seed: int, order: list[int]) -> None:
    weights = [2.0, 1.0] if is_weighted else [None, None]
    forward = Mixture([7, 5], weights, seed)
    expected = [forward.draw(position) for position in range(40)]
    other = Mixture([7, 5], weights, seed)
    assert {position: other.draw(position) for position in order} == dict(enumerate(expected))


def test_orders_are_fixed_for_ever() -> None:
    # A changed number here means that runs of earlier versions can no longer be resumed exactly.
    assert [Mixture([6], [None], 0).draw(position)[1] for position in range(12)] == [5, 2, 0, 4, 3, 1, 4, 3, 0, 2, 5, 1]
    assert [Mixture([3, 3], [2.0, 1.0], 7).draw(position) for position in range(6)] == [
        (1, 2),
        (0, 0),
        (0, 2),
        (1, 1),
        (0, 1),
        (0, 1),
    ]


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {
        tuple(Mixture([20], [None], seed).draw(epoch * 20 + i) for i in range(20))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_first_positions_are_uniform() -> None:
    # 4000 draws over 8 rows: 500 expected each, standard deviation about 21.
    counts = Counter(Mixture([8], [None], seed).draw(0)[1] for seed in range(4000))
    assert all(abs(counts[row] - 500) < 5 * math.sqrt(500) for row in range(8))


@pytest.mark.parametrize(
    ("sizes", "weights", "said"),
    [
        ([], [], "no data set"),
        ([3, 0], [None, None], "data set 2 has no rows"),
        ([3, 3], [1.0, None], "1 of 2 data sets have a weight, but not data set 2"),
        ([3], [0.0], "weight 0.0 is not a positive number"),
        ([3], [float("nan")], "weight nan"),
        ([3, 3], [1.0, 0.001], "gives data set 2 no row of an epoch of 6"),
    ],
)
def test_wrong_mixtures_are_refused(sizes: list[int], weights: list[float | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mixture(sizes, weights, seed=0)


_GROUPED = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=14), min_size=1, max_size=3)


def _runs(drawn: list[int], groups: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for row in drawn:
        if runs and groups[runs[-1][-1]] == groups[row]:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


@given(_GROUPED, st.integers(), st.integers(2, 5), st.integers(0, 2))
def test_rows_of_a_group_stand_together(groups: list[list[int]], seed: int, piece: int, epoch: int) -> None:
    sizes = [len(item) for item in groups]
    mixture = Mixture(sizes, [None] * len(sizes), seed, lambda: groups, piece)
    length = mixture.epoch_length
    drawn = [mixture.draw(epoch * length + position) for position in range(length)]
    assert sorted(drawn) == [(dataset, row) for dataset, size in enumerate(sizes) for row in range(size)]
    # Over all data sets together: at most as many stretches as the pieces of each group.
    stretches = Counter(
        groups[dataset][row]
        for index, (dataset, row) in enumerate(drawn)
        if index == 0 or groups[drawn[index - 1][0]][drawn[index - 1][1]] != groups[dataset][row]
    )
    members = Counter(group for item in groups for group in item)
    assert all(count <= math.ceil(members[group] / piece) for group, count in stretches.items())


@given(_GROUPED, st.integers(), st.integers(2, 5))
def test_rows_of_a_group_stand_together_within_their_share(groups: list[list[int]], seed: int, piece: int) -> None:
    sizes = [len(item) for item in groups]
    weights = [float(index + 1) for index in range(len(sizes))]
    try:
        plain = Mixture(sizes, weights, seed)
    except ConfigError:
        return  # a data set that would never be drawn
    mixture = Mixture(sizes, weights, seed, lambda: groups, piece)
    length = mixture.epoch_length
    rows: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        drawn = [mixture.draw(epoch * length + position) for position in range(length)]
        rows.update(drawn)
        assert Counter(dataset for dataset, _ in drawn) == Counter(
            plain.draw(epoch * length + position)[0] for position in range(length)
        )
        for dataset, size in enumerate(sizes):  # never twice before all once
            counts = [rows[dataset, row] for row in range(size)]
            assert max(counts) - min(counts) <= 1


def test_the_size_of_a_piece_is_limited_and_groups_are_shuffled() -> None:
    groups = [[0] * 7 + [1] * 5 + [2] * 3]
    mixture = Mixture([15], [None], 0, lambda: groups, 3)
    orders = [[mixture.draw(epoch * 15 + position)[1] for position in range(15)] for epoch in range(8)]
    lengths = sorted(Counter(tuple(sorted(len(run) for run in _runs(order, groups[0]))) for order in orders))
    assert len({tuple(order) for order in orders}) == 8
    assert any(max(length) == 3 for length in lengths)  # pieces of 3, 3, 1 rows of the first group need not touch
    firsts = {groups[0][order[0]] for order in orders}
    assert len(firsts) > 1


def test_pieces_of_one_row_are_the_order_without_groups() -> None:
    def refuse() -> list[list[int]]:
        raise AssertionError("groups are not needed")

    one = Mixture([5, 4], [2.0, 1.0], 3, refuse, 1)
    without = Mixture([5, 4], [2.0, 1.0], 3)
    assert [one.draw(index) for index in range(30)] == [without.draw(index) for index in range(30)]


def test_a_draw_of_groups_depends_on_seed_and_position_only() -> None:
    groups = [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 4, 4]]
    for weights in ([None, None], [2.0, 1.0]):
        forward = Mixture([7, 5], weights, 9, lambda: groups, 2)
        expected = [forward.draw(position) for position in range(40)]
        other = Mixture([7, 5], weights, 9, lambda: groups, 2)
        assert [other.draw(position) for position in reversed(range(40))] == expected[::-1]
