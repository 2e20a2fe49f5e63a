"""The line a person reads."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.engine.monitors.records import record
from triptych.core.types import Progress
from triptych.engine.monitors.console import ConsoleConfig, ConsoleMonitor


def build(window: int = 100, log_every: int = 1, terminal: bool = False) -> tuple[ConsoleMonitor, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200)
    return ConsoleMonitor(ConsoleConfig(window=window), Path("unused"), log_every, console), stream


@pytest.mark.requirement("G-9")
def test_the_running_loss_is_weighted_by_supervised_tokens() -> None:
    monitor, _ = build(window=3)
    assert math.isnan(monitor.running_loss)
    monitor.on_step(record(1, 100.0))
    monitor.on_step(record(2, 1.0, supervised_tokens=30))
    monitor.on_step(record(3, 3.0, supervised_tokens=10))
    monitor.on_step(record(4, math.nan))
    assert monitor.running_loss == pytest.approx((100 * 10 + 1 * 30 + 3 * 10) / 50)

    monitor.on_step(record(5, 2.0, supervised_tokens=10))
    assert monitor.running_loss == pytest.approx((1 * 30 + 3 * 10 + 2 * 10) / 50)


@pytest.mark.requirement("G-9")
def test_without_supervised_tokens_samples_weigh() -> None:
    monitor, _ = build()
    monitor.on_step(record(1, 1.0, supervised_tokens=0, samples=3))
    monitor.on_step(record(2, 5.0, supervised_tokens=0, samples=1))

    assert monitor.running_loss == 2.0


@pytest.mark.requirement("G-8", "G-9")
def test_without_a_terminal_a_line_comes_every_two_steps_and_at_the_end() -> None:
    monitor, stream = build(log_every=2)
    monitor.on_start(Progress(0, 5))
    for step in range(1, 6):
        monitor.on_step(record(step, 2.0, total=5, skipped_rows=step % 2))
    monitor.on_evaluation(Progress(5, 5), {"loss": 0.123456, "accuracy": 1.0})
    monitor.on_checkpoint(Progress(5, 5), Path("run/checkpoints/step-00000005"))
    monitor.on_end(Progress(5, 5), None)

    numbers = "loss 2.0000  lr 1.00e-04  4.0 samples/s  40 tokens/s  data 25%  3.0 GiB"
    assert stream.getvalue().splitlines() == [
        "start at step 0 of 5",
        f"step 2/5  {numbers}  eta 0:00:03  1 rows left out",
        f"step 4/5  {numbers}  eta 0:00:01  2 rows left out",
        f"step 5/5  {numbers}  eta 0:00:00  3 rows left out",
        "evaluation at step 5: loss 0.1235  accuracy 1",
        "checkpoint of step 5: run/checkpoints/step-00000005",
        "finished at step 5, loss 2.0000",
    ]


@pytest.mark.requirement("G-9")
def test_on_a_terminal_a_bar_shows_the_same_numbers() -> None:
    monitor, stream = build(terminal=True)
    monitor.on_start(Progress(10, 100))
    monitor.on_step(record(11, 2.0, learning_rates={"a": 1e-3, "b": 1e-5}, is_skipped=True))
    monitor.on_end(Progress(11, 100), ValueError("x"))

    text = stream.getvalue()
    assert "11/100" in text and "lr 1.00e-05..1.00e-03" in text and "1 steps skipped" in text
    assert "stopped by ValueError at step 11" in text


def test_a_run_that_stops_before_its_first_step_has_no_loss() -> None:
    monitor, stream = build()
    monitor.on_start(Progress(0, 10))
    monitor.on_end(Progress(0, 10), ValueError("x"))
    assert "stopped by ValueError at step 0\n" in stream.getvalue()


def test_an_endless_run_has_no_end_time() -> None:
    monitor, stream = build()
    monitor.on_step(record(1, total=None))

    assert "step 1/?" in stream.getvalue() and "eta -" in stream.getvalue()


def test_the_state_survives_a_resume() -> None:
    first, _ = build(window=2)
    for step, loss in enumerate((9.0, 1.0, 2.0), 1):
        first.on_step(record(step, loss, skipped_rows=1))
    second, _ = build(window=2)
    second.load_state_dict(first.state_dict())

    assert second.running_loss == 1.5
    assert second.state_dict() == first.state_dict()
    assert second.describe(record(4)) == first.describe(record(4))


def test_a_run_of_an_earlier_version_goes_on_with_its_counts() -> None:
    monitor, _ = build()
    monitor.load_state_dict({"recent": [[1.0, 10, 4, 1.0, 0.25]], "skipped_rows": 2, "skipped_steps": 1})

    assert "2 rows left out  1 steps skipped" in monitor.describe(record(4))
