"""Early stopping: what counts as better, what counts as waiting."""

from __future__ import annotations

import math

import pytest

from triptych.core.errors import TrainingError
from triptych.engine.stopping import BestConfig, BestTracker


def run(values: list[float], **config: object) -> tuple[BestTracker, list[bool]]:
    tracker = BestTracker(BestConfig(metric="loss", **config))  # type: ignore[arg-type]
    return tracker, [tracker.update(step, {"loss": value}) for step, value in enumerate(values, 1)]


@pytest.mark.requirement("G-1", "G-2")
def test_three_evaluations_without_improvement_stop() -> None:
    tracker, improved = run([1.0, 0.5, 0.6, 0.5, 0.7], patience=3)

    assert improved == [True, True, False, False, False]
    assert (tracker.value, tracker.step, tracker.results) == (0.5, 2, {"loss": 0.5})
    assert tracker.should_stop


@pytest.mark.requirement("G-1")
def test_a_value_that_is_not_finite_never_blocks_later_ones() -> None:
    tracker, improved = run([math.nan, 2.0, -math.inf, 1.0], patience=3)

    assert improved == [False, True, False, True]
    assert tracker.value == 1.0
    assert run([math.nan] * 3, patience=3)[0].should_stop


@pytest.mark.requirement("G-1")
def test_higher_can_be_better() -> None:
    tracker, improved = run([0.2, 0.1, 0.4], mode="max")

    assert improved == [True, False, True]
    assert (tracker.value, tracker.step) == (0.4, 3)


@pytest.mark.requirement("G-2")
def test_small_steps_are_the_best_checkpoint_and_add_up_against_the_patience() -> None:
    slow, improved = run([1.0, 0.96, 0.92, 0.88], delta=0.1, patience=3)
    assert improved == [True, True, True, True]
    assert slow.value == 0.88 and not slow.should_stop  # 1.0 - 0.88 > 0.1 within three evaluations

    slower, _ = run([1.0, 0.98, 0.96, 0.94], delta=0.1, patience=3)
    assert slower.value == 0.94 and slower.should_stop


@pytest.mark.requirement("G-1")
def test_the_state_survives_a_resume() -> None:
    values = [1.0, 0.5, 0.6, 0.7]
    whole, _ = run(values, patience=3)
    half, _ = run(values[:2], patience=3)
    resumed = BestTracker(BestConfig(metric="loss", patience=3))
    resumed.load_state_dict(half.state_dict())
    for step in (3, 4):
        resumed.update(step, {"loss": values[step - 1]})

    assert resumed.state_dict() == whole.state_dict()
    assert not resumed.should_stop
    resumed.update(5, {"loss": 0.5})
    assert resumed.should_stop


def test_an_unknown_metric_is_named_with_the_nearest() -> None:
    with pytest.raises(TrainingError, match=r"no metric `loss`") as caught:
        BestTracker(BestConfig(metric="loss")).update(1, {"losses": 1.0})
    assert "did you mean `losses`?" in str(caught.value)
