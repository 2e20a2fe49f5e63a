"""The curves are there, under the right names, at the right steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.engine.monitors.records import record
from triptych.core.types import Progress
from triptych.engine.monitors.tensorboard import TensorBoardConfig, TensorBoardMonitor, scalars


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(item.step, item.value) for item in events.Scalars(tag)]


@pytest.mark.requirement("G-8")
def test_points_come_every_two_steps_and_a_resume_replaces_what_came_after_it(tmp_path: Path) -> None:
    killed = TensorBoardMonitor(TensorBoardConfig(), tmp_path, 2)
    killed.on_start(Progress(0, 9))
    for step in range(1, 7):
        killed.on_step(record(step, float(step)))
    killed.on_evaluation(Progress(2, 9), {"accuracy": 0.5})
    killed.on_end(Progress(6, 9), None)
    time.sleep(1.1)  # files are read in the order of the second in their names

    resumed = TensorBoardMonitor(TensorBoardConfig(), tmp_path, 2)
    resumed.on_start(Progress(3, 9))
    resumed.on_step(record(4, -4.0))
    resumed.on_end(Progress(4, 9), None)

    assert points(tmp_path, "loss") == [(2, 2.0), (4, -4.0)]
    assert points(tmp_path, "evaluation/accuracy") == [(2, 0.5)]


def test_names_and_speeds_by_hand() -> None:
    values = scalars(record(1, 2.0, seconds=2.0, metrics={"p": 0.5}))

    assert values == {
        "loss": 2.0,
        "terms/nll": 2.0,
        "metrics/p": 0.5,
        "learning_rate/language": 1e-4,
        "gradient_norm/all": 1.0,
        "gradient_norm/language": 1.0,
        "speed/samples_per_second": 2.0,
        "speed/tokens_per_second": 20.0,
        "speed/supervised_tokens_per_second": 5.0,
        "speed/data_share": 0.125,
        "speed/memory_bytes": 3.0 * 2**30,
    }
