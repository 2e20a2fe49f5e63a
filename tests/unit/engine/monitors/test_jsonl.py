"""The log for programs: one line each, valid JSON, the same after a resume as without."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.unit.engine.monitors.records import record
from triptych.core.types import Progress
from triptych.engine.monitors.jsonl import JsonlConfig, JsonlMonitor


def build(folder: Path) -> JsonlMonitor:
    return JsonlMonitor(JsonlConfig(), folder, 10)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.requirement("G-8")
def test_every_step_evaluation_and_checkpoint_is_a_line_at_once(tmp_path: Path) -> None:
    monitor = build(tmp_path / "run")
    monitor.on_start(Progress(0, 2))
    monitor.on_step(record(1, 0.5, total=2))
    assert len(lines(tmp_path / "run")) == 1
    monitor.on_evaluation(Progress(1, 2), {"loss": 0.25})
    monitor.on_checkpoint(Progress(1, 2), Path("a/step-00000001"))
    monitor.on_end(Progress(1, 2), ValueError("why"))

    step, evaluation, checkpoint, error = lines(tmp_path / "run")
    assert (step["event"], step["step"], step["loss"], step["epoch"]) == ("step", 1, 0.5, 0.1)
    assert (step["terms"], step["supervised_tokens"], step["is_skipped"]) == ({"nll": 0.5}, 10, False)
    assert (evaluation["event"], evaluation["results"]) == ("evaluation", {"loss": 0.25})
    assert (checkpoint["event"], checkpoint["name"]) == ("checkpoint", "step-00000001")
    assert (error["event"], error["kind"], error["message"]) == ("error", "ValueError", "why")


def test_numbers_that_json_lacks_become_strings(tmp_path: Path) -> None:
    monitor = build(tmp_path)
    monitor.on_start(Progress(0, 2))
    monitor.on_step(record(1, math.nan, gradient_norm=math.inf))

    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["gradient_norm"]) == ("nan", "inf")


@pytest.mark.requirement("G-7")
def test_a_resume_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    killed = build(tmp_path)
    killed.on_start(Progress(0, 9))
    for step in (1, 2):
        killed.on_step(record(step))
    state = killed.state_dict()
    killed.on_checkpoint(Progress(2, 9), Path("step-00000002"))
    killed.on_step(record(3, 7.0))

    resumed = build(tmp_path)
    resumed.load_state_dict(state)
    resumed.on_start(Progress(2, 9))
    resumed.on_checkpoint(Progress(2, 9), Path("step-00000002"))
    resumed.on_step(record(3, 1.0))

    found = lines(tmp_path)
    assert [(line["event"], line["step"]) for line in found] == [
        ("step", 1),
        ("step", 2),
        ("checkpoint", 2),
        ("step", 3),
    ]
    assert found[-1]["loss"] == 1.0


def test_a_run_without_checkpoint_starts_the_log_again(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"half a li')
    monitor = build(tmp_path)
    monitor.on_start(Progress(0, 9))
    monitor.on_step(record(1))

    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_log_that_was_deleted_does_not_stop_a_resume(tmp_path: Path) -> None:
    monitor = build(tmp_path)
    monitor.load_state_dict({"length": 5000})
    monitor.on_start(Progress(5, 9))
    monitor.on_step(record(6))

    assert [line["step"] for line in lines(tmp_path)] == [6]
