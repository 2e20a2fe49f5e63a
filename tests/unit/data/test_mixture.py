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
