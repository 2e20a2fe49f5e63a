"""Each warning at the step where a person would want it, and not at every step."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from tests.unit.engine.monitors.records import record
from triptych.core.types import Progress
from triptych.engine.monitors.health import HealthConfig, HealthMonitor


def build(**config: object) -> HealthMonitor:
    return HealthMonitor(HealthConfig(**config), Path("unused"), 10)  # type: ignore[arg-type]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [item.getMessage() for item in caplog.records]


def test_a_quiet_run_is_not_disturbed(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build(plateau=10)
    for step in range(1, 101):
        monitor.on_step(record(step, 100.0 / step))
    monitor.on_evaluation(Progress(100, 100), {"loss": 1.0})
    monitor.on_end(Progress(100, 100), None)

    assert monitor.counts == {} and messages(caplog) == []


@pytest.mark.requirement("F-10")
def test_exploding_and_vanishing_gradients_are_told_by_component(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build()
    monitor.on_step(record(1, component_gradient_norms={"vision": 100.0, "language": 1e-7}))
    assert monitor.counts == {}
    monitor.on_step(record(2, component_gradient_norms={"vision": 101.0, "language": 1e-8}))

    assert monitor.counts == {"exploding gradient": 1, "vanishing gradient": 1}
    assert messages(caplog) == [
        "step 2: exploding gradient: gradient norm of vision is 101 (over 100): risk of explosion",
        "step 2: vanishing gradient: gradient norm of language is 1e-08 (under 1e-07): it learns nothing",
    ]


def test_a_window_whose_rows_were_all_left_out_is_no_vanishing_gradient() -> None:
    monitor = build()
    monitor.on_step(record(1, component_gradient_norms={"language": 0.0}, samples=0, skipped_rows=8))
    assert monitor.counts == {}


def test_a_loss_spike_is_measured_against_the_running_mean(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build(spike=3.0, warmup=5)
    for step in range(1, 6):
        monitor.on_step(record(step, 2.0))
    monitor.on_step(record(6, 5.5))
    assert monitor.counts == {}
    # mean of five twos and 5.5: (0.95 (1 - 0.95^5) 2 + 0.05 * 5.5) / (1 - 0.95^6)
    mean = (0.95 * (1 - 0.95**5) * 2 + 0.05 * 5.5) / (1 - 0.95**6)
    monitor.on_step(record(7, 3 * mean * 1.001))

    assert monitor.counts == {"loss spike": 1}
    assert f"over 3 x its mean {mean:.4g}" in messages(caplog)[0]


@pytest.mark.requirement("G-20")
def test_overflows_are_counted_and_a_scale_below_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build()
    monitor.on_step(record(1, is_skipped=True, gradient_norm=math.inf, metrics={"loss_scale": 2.0}))
    monitor.on_step(record(2, is_skipped=True, metrics={"loss_scale": 1.0}))
    monitor.on_step(record(3, is_skipped=True, metrics={"loss_scale": 0.5}))

    assert monitor.counts == {"skipped step": 3, "loss scale": 1}
    assert "step 3: loss scale: the fp16 loss scale is down to 0.5; use bf16 or fp32" in messages(caplog)


@pytest.mark.requirement("F-10")
def test_values_that_are_not_finite_are_named(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build(quiet=1)
    monitor.on_step(record(1, metrics={"accuracy": math.nan}))
    monitor.on_evaluation(Progress(2, 9), {"recall": math.inf})

    assert messages(caplog) == [
        "step 1: non-finite value: `accuracy` is nan",
        "step 2: non-finite value: evaluation `recall` is inf",
    ]


def test_slow_convergence_compares_equal_stretches(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build(plateau=4, min_decline=0.1)
    for step, loss in enumerate([4.0] * 4 + [3.0] * 4 + [2.8] * 4, 1):
        monitor.on_step(record(step, loss))

    assert monitor.counts == {"slow convergence": 1}
    assert "the mean loss of the last 4 steps is 2.8, before that 3" in messages(caplog)[0]


def test_the_same_warning_is_repeated_only_after_a_while_but_always_counted(caplog: pytest.LogCaptureFixture) -> None:
    monitor = build(quiet=10)
    for step in range(1, 13):
        monitor.on_step(record(step, component_gradient_norms={"vision": 1e3}))
    assert len(messages(caplog)) == 2

    monitor.on_end(Progress(12, 12), None)
    assert messages(caplog)[-1] == "health: 12 x exploding gradient"


def test_the_state_survives_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    losses = [2.0, 2.5, 1.0, 9.0, 2.0, 30.0, 1.0, 1.0]
    config = {"warmup": 2, "plateau": 3}
    whole, half, resumed = build(**config), build(**config), build(**config)
    for step, loss in enumerate(losses, 1):
        whole.on_step(record(step, loss))
        if step <= 4:
            half.on_step(record(step, loss))
        if step == 4:
            resumed.load_state_dict(half.state_dict())
        if step > 4:
            resumed.on_step(record(step, loss))
    assert whole.counts["loss spike"] == 2
    assert resumed.state_dict() == whole.state_dict()
    assert caplog.records[0].levelno == logging.WARNING
