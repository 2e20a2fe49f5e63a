"""The search on memory that is known, and passes whose memory is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.invariants.toys import OBJECTIVES, ToyScorer, ToySource, gradients, runtime, toy_batch
from triptych.core.types import Batch, Scores
from triptych.engine.micro_batch import (
    MARGIN,
    Meter,
    Point,
    Room,
    TooLargeError,
    climb,
    confirm,
    find_room,
    grow,
    predict,
    untouched_run,
)
from triptych.engine.state import random_state

MIB = 2**20


def room(passes: int, available: int | None = None) -> Room:
    """Memory of which `passes` may be used, with 30 bytes reserved."""
    result = Room(available or 2 * passes + 30, math.ceil(passes / MARGIN) + 30, gradients=10, optimizer=20)
    assert passes - 1 <= result.passes <= passes + 1
    return result


class Curve:
    """Memory of a pass as a function of its tokens; notes what was measured."""

    def __init__(self, base: float, linear: float, quadratic: float = 0.0) -> None:
        self.parts = base, linear, quadratic
        self.measured: list[int] = []

    def at(self, tokens: int) -> int:
        base, linear, quadratic = self.parts
        return int(base + linear * tokens + quadratic * tokens**2)

    def point(self, tokens: int) -> Point:
        self.measured.append(tokens)
        return Point(tokens, self.at(tokens))


def test_linear_memory_is_used_almost_whole_in_doubling_steps() -> None:
    curve = Curve(1000, 10)
    tokens, points = grow([curve.point(50), curve.point(100)], 10**6, curve.point, room(50_000))
    assert curve.at(tokens) <= 50_000 < 1.15 * curve.at(tokens)
    assert points[-1] == Point(tokens, curve.at(tokens))  # what is adopted was measured itself
    assert curve.measured[:4] == [50, 100, 200, 400]
    assert all(following <= 2 * before for before, following in zip(curve.measured, curve.measured[1:], strict=False))


@given(st.floats(0, 1e5), st.floats(0.01, 100), st.floats(0, 1), st.integers(10, 200), st.floats(1.0, 50))
def test_no_pass_leaves_its_room_whatever_grows(
    base: float, linear: float, quadratic: float, first: int, factor: float
) -> None:
    curve = Curve(base, linear, quadratic)
    space = int(factor * curve.at(first)) + 1
    start = [curve.point(max(1, first // 2)), curve.point(first)]
    tokens, points = grow(start, 10_000, curve.point, room(space))
    assert all(curve.at(count) <= space + 3 for count in curve.measured)  # 3 for whole bytes
    assert tokens >= first and points[-1].tokens == tokens
    if quadratic == 0 and tokens < 10_000 and space > 100:
        assert curve.at(tokens) >= 0.8 * space or curve.at(math.ceil(1.1 * tokens)) >= 0.8 * space


def test_growth_ends_where_a_step_holds_no_more() -> None:
    curve = Curve(0, 1)
    assert grow([curve.point(100)], 350, curve.point, room(10_000))[0] == 350
    assert curve.measured == [100, 200, 350]
    assert grow([Point(100, 100)], 100, curve.point, room(10_000)) == (100, [Point(100, 100)])


def test_rows_of_one_length_fill_a_budget_in_whole_rows() -> None:
    """Budgets between two multiples hold as many rows as the lower one: they need no more, and tell nothing new."""
    measured: list[int] = []

    def whole_rows(tokens: int) -> Point:
        measured.append(tokens)
        return Point(tokens // 100 * 100, tokens // 100 * 1000)

    tokens, points = grow([Point(100, 1000)], 800, whole_rows, room(1500))
    assert (tokens, points) == (150, [Point(100, 1000)])
    tokens, points = grow([Point(100, 1000)], 800, whole_rows, room(4500))
    assert 400 <= tokens < 500 and points[-1] == Point(400, 4000)


def test_a_pass_that_needs_more_than_was_expected_is_not_adopted() -> None:
    def jump(tokens: int) -> Point:
        return Point(tokens, 100 if tokens < 250 else 1000)

    assert grow([Point(100, 90)], 10_000, jump, room(500)) == (200, [Point(100, 90), Point(200, 100)])


def test_a_budget_at_which_passes_in_turn_need_more_is_lowered() -> None:
    """One pass adds 1 byte a token, several add 1.5."""
    measured: list[int] = []

    def measure(tokens: int) -> int:
        measured.append(tokens)
        return int(1.5 * tokens)

    point = confirm(1000, 100, measure, room(1000))
    assert point.tokens == pytest.approx(667, abs=1) and point.added <= 1000 and len(measured) <= 3
    assert confirm(600, 100, measure, room(1000)) == Point(600, 900)
    with pytest.raises(TooLargeError) as caught:
        confirm(1000, 700, measure, room(1000))
    assert (caught.value.tokens, caught.value.added) == (700, 1050)


def test_prediction_is_exact_for_quadratic_and_above_linear_growth() -> None:
    square, line = Curve(500, 0, 2), Curve(500, 20)
    for curve in (square, line):
        assert predict([curve.point(10), curve.point(20)], 40) >= curve.at(40)
    assert predict([square.point(10), square.point(20)], 40) == square.at(40)
    assert predict([Point(10, 100)], 20) == 200
    # 19 and 20 tokens differ by chance; the growth is that since 10.
    assert predict([Point(10, 100), Point(19, 230), Point(20, 200)], 40) == pytest.approx(200 + 100 * 4)


def test_rows_are_measured_from_the_shortest_up() -> None:
    lengths = [10, 12, 19, 20, 21, 30, 39, 90, 91]
    measured: list[int] = []

    def measure(place: int) -> int:
        measured.append(lengths[place])
        return 3 * lengths[place]

    points = climb(lengths, measure, room(10_000))
    assert measured == [10, 10, 20, 39, 90, 91]  # the first twice; nothing lies between 39 and 78
    assert points == [Point(count, 3 * count) for count in (10, 20, 39, 90, 91)]
    assert climb([7, 7], lambda place: 5, room(10)) == [Point(7, 5)]


def test_a_row_without_room_is_known_by_measure_or_before() -> None:
    lengths = [10, 20, 40, 80]
    with pytest.raises(TooLargeError) as measured:
        climb(lengths, lambda place: 10 * lengths[place], room(350, available=10_000))
    assert (measured.value.tokens, measured.value.added, measured.value.is_measured) == (40, 400, True)

    passes: list[int] = []

    def measure(place: int) -> int:
        passes.append(place)
        return lengths[place] ** 2

    with pytest.raises(TooLargeError) as expected:  # 80 rows would add 6,400 of the 5,000 that there are
        climb(lengths, measure, room(4000, available=5030))
    assert (expected.value.tokens, expected.value.is_measured) == (80, False)
    assert 3 not in passes and expected.value.added == pytest.approx(6400)


class Holder(torch.autograd.Function):
    """Keeps `count` bytes from the forward to the backward pass."""

    @staticmethod
    def forward(context: Any, value: Tensor, count: int) -> Tensor:
        context.save_for_backward(torch.ones(count, dtype=torch.uint8))
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class KnownScorer(nn.Module):
    """Keeps 1 MiB for each token; a buffer counts its passes, and it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(1000), requires_grad=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Scores:
        self.passes += 1
        torch.rand(1)
        held = Holder.apply(self.value, int(batch.lengths.sum()) * MIB)  # type: ignore[no-untyped-call]
        return Scores(token_logprobs=held.sum().expand(int(batch.supervised.sum())))


class NoPixels(ToySource):
    def attach(self, batch: Batch) -> Batch:
        return replace(batch, pixels={})


def known_meter(scorer: nn.Module) -> Meter:
    return Meter(scorer, OBJECTIVES["language"], NoPixels(), None, runtime())


def test_a_pass_of_known_memory_is_measured() -> None:
    meter = known_meter(KnownScorer())
    small, large = toy_batch([0, 1]), toy_batch(range(8))
    meter.measure(small)
    for batch in (small, large, small):
        expected = int(batch.lengths.sum()) * MIB
        assert meter.measure(batch) == pytest.approx(expected, rel=0.1, abs=8 * MIB)


def test_a_budget_is_found_on_known_memory() -> None:
    meter = known_meter(KnownScorer())
    row = toy_batch([0])
    tokens_of_row = int(row.lengths.sum())

    def measure(tokens: int) -> Point:
        batch = toy_batch([0] * (tokens // tokens_of_row))
        return Point(int(batch.lengths.sum()), meter.measure(batch))

    meter.measure(row)
    tokens, points = grow([measure(tokens_of_row)], 10**4, measure, room(150 * MIB))
    assert points[-1].added <= 150 * MIB
    assert 150 - 3 * tokens_of_row < points[-1].tokens < 160 and tokens >= points[-1].tokens


def test_pixels_that_a_source_holds_ready_count() -> None:
    class Pictures(ToySource):
        def attach(self, batch: Batch) -> Batch:
            return replace(batch, pixels={"values": torch.ones(40 * MIB, dtype=torch.uint8)})

    class Plain(KnownScorer):
        def forward(self, batch: Batch) -> Scores:
            return Scores(token_logprobs=self.value.sum().expand(int(batch.supervised.sum())))

    meter = Meter(Plain(), OBJECTIVES["language"], Pictures(), None, runtime())
    meter.measure(toy_batch([0]))
    assert meter.measure(toy_batch([0])) == pytest.approx(80 * MIB, rel=0.1)


def test_passes_leave_nothing_behind() -> None:
    scorer, source = ToyScorer(dropout=0.5).train(), ToySource()
    scorer.blocks[0].eval()
    scorer.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    scorer.register_forward_hook(lambda module, inputs, output: module.seen.add_(1) and None)
    before = {name: item.clone() for name, item in scorer.state_dict().items()}
    modes = [item.training for item in scorer.modules()]
    state = random_state()
    meter = Meter(scorer, OBJECTIVES["language"], source, None, runtime())
    with untouched_run(scorer):
        meter.measure(toy_batch([0, 1]))
        scorer.eval()
        assert gradients(scorer) and int(scorer.seen) == 1
        assert not torch.equal(torch.get_rng_state(), state["torch"])
    assert [item.training for item in scorer.modules()] == modes
    assert all(item.grad is None for item in scorer.parameters())
    assert all(torch.equal(before[name], item) for name, item in scorer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state["torch"])


def test_a_limit_above_what_there_is_is_what_there_is() -> None:
    found = find_room(KnownScorer(), runtime(), "900 TiB")
    assert found.limit == found.available < 900 * 2**40


def test_gradients_and_two_running_means_are_reserved() -> None:
    scorer = KnownScorer()
    found = find_room(scorer, runtime(), "1 GiB")
    assert (found.gradients, found.optimizer, found.limit) == (12, 24, 2**30)
    assert found.passes == int(MARGIN * (2**30 - 36))
    scorer.to(torch.bfloat16)  # state in single precision all the same
    assert find_room(scorer, runtime(), 0.5).reserved == 6 + 24
    assert find_room(scorer, runtime(), 0.5, keeps_master=True).reserved == 6 + 24 + 12
    assert find_room(scorer, runtime(), 0.5).limit == pytest.approx(found.available / 2, rel=0.1)
