"""Schedules by hand-checkable points."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from triptych.core.errors import ConfigError
from triptych.engine.schedules import CosineConfig, ScheduleConfig, multiplier


def schedule(**values: Any) -> ScheduleConfig:
    result: ScheduleConfig = TypeAdapter(ScheduleConfig).validate_python(values)
    return result


def curve(config: ScheduleConfig, total: int | None, steps: list[int]) -> list[float]:
    return [multiplier(config, step, total) for step in steps]


@pytest.mark.requirement("F-1")
def test_cosine_with_warmup_and_after_its_end() -> None:
    config = schedule(kind="cosine", warmup=10, min_ratio=0.1)
    # Warm-up 1/11, 2/11, ..., 10/11, then 1 at step 10; half-way down at 55; the end at 100.
    points = curve(config, 100, [0, 9, 10, 55, 100])
    assert points == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55, 0.1])
    # Without the clamp the curve would be back at its peak at step 190.
    assert curve(config, 100, [145, 190]) == [0.1, 0.1]


def test_the_first_step_is_not_wasted() -> None:
    for kind in ("cosine", "linear", "constant"):
        assert multiplier(schedule(kind=kind, warmup=4), 0, 100) == pytest.approx(0.2)


@pytest.mark.requirement("F-1")
def test_linear_and_constant() -> None:
    linear = schedule(kind="linear", warmup=0, min_ratio=0.2)
    assert curve(linear, 10, [0, 5, 10, 20]) == pytest.approx([1.0, 0.6, 0.2, 0.2])
    constant = schedule(kind="constant", warmup=1)
    assert curve(constant, None, [0, 1, 10**9]) == pytest.approx([0.5, 1.0, 1.0])


@pytest.mark.requirement("F-2")
def test_three_phases() -> None:
    # Peak 2e-4: 1e-6 -> 2e-4 in 10 steps, falling to 1e-4 by step 70, then half a cosine to 1e-5 at 100.
    config = schedule(
        kind="three_phase",
        warmup="10%",
        cooldown="30%",
        start_ratio=0.005,
        plateau_end_ratio=0.5,
        min_ratio=0.05,
    )
    rates = [2e-4 * point for point in curve(config, 100, [0, 5, 10, 40, 70, 85, 100, 150])]
    assert rates == pytest.approx([1e-6, 1.005e-4, 2e-4, 1.5e-4, 1e-4, 5.5e-5, 1e-5, 1e-5])
    flat = schedule(kind="three_phase")
    assert curve(flat, 1000, [50, 400, 699]) == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.requirement("F-2")
def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"warm-up \(60 steps\) and cool-down \(50\) do not fit into 100"):
        multiplier(schedule(kind="three_phase", warmup="60%", cooldown=50), 0, 100)


@pytest.mark.parametrize(("given", "steps"), [("3%", 6), (0.03, 6), (6, 6), ("2.5 %", 5), (0, 0), ("100%", 200)])
def test_warmup_is_steps_or_a_share_of_the_real_number_of_steps(given: object, steps: int) -> None:
    config = schedule(kind="cosine", warmup=given)
    assert multiplier(config, steps, 200) == 1.0
    if steps:
        assert multiplier(config, steps - 1, 200) == pytest.approx(steps / (steps + 1))


def test_a_section_that_names_no_kind_is_a_cosine() -> None:
    config = schedule(warmup="10%")
    assert isinstance(config, CosineConfig) and multiplier(config, 20, 200) == 1.0


@pytest.mark.parametrize("given", ["3 percent", -1, 1.5, "-3%", True, None, [1]])
def test_a_warmup_that_is_neither_is_refused(given: object) -> None:
    with pytest.raises(ValidationError, match="warmup"):
        CosineConfig(warmup=given)  # type: ignore[arg-type]


def test_a_share_of_an_endless_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the length of the run"):
        multiplier(schedule(kind="cosine", warmup=10), 50, None)
    with pytest.raises(ConfigError, match="needs the length of the run"):
        multiplier(schedule(kind="constant", warmup="3%"), 0, None)


def test_every_schedule_is_continuous_and_within_its_bounds() -> None:
    for kind in ("cosine", "linear", "constant", "three_phase"):
        points = curve(schedule(kind=kind, warmup="10%"), 1000, list(range(1100)))
        jumps = [abs(right - left) for left, right in itertools.pairwise(points)]
        assert max(jumps) < 0.011 and min(points) >= 0.0 and max(points) <= 1.0
