"""What a run's state holds: what is trained and what changes, nothing that is frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.invariants.launch import launch
from tests.unit.engine.toy_run import assert_identical, outcome, toy_trainer
from triptych.core.errors import CheckpointError
from triptych.engine.checkpoint import read
from triptych.engine.monitors import HealthMonitor, JsonlMonitor
from triptych.engine.monitors.health import HealthConfig
from triptych.engine.monitors.jsonl import JsonlConfig


@pytest.mark.requirement("G-3", "G-5")
def test_frozen_weights_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    snapshot = read(toy_trainer(tmp_path).fit().checkpoint)

    assert sorted(snapshot.weights) == ["embedding.weight", "head.bias", "head.weight", "seen"]
    assert int(snapshot.weights["seen"]) == 30  # three epochs of ten samples
    assert sorted(snapshot.optimizer["state"]) == ["embedding.weight", "head.bias", "head.weight"]
    assert snapshot.ranks[0]["source"] == {"position": 9}
    assert set(snapshot.ranks[0]["random"]) >= {"python", "numpy", "torch"}
    assert snapshot.shared["trainer"]["step"] == 9


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.fit()
    other = toy_trainer(tmp_path)
    other.scorer.register_buffer("extra", torch.zeros(1))

    with pytest.raises(CheckpointError, match=r"weights of the checkpoint do not fit the model: .*extra"):
        other.fit()


def test_monitors_may_be_added_and_taken_away_between_two_starts(tmp_path: Path) -> None:
    two = [JsonlMonitor(JsonlConfig(file="a"), tmp_path, 1), JsonlMonitor(JsonlConfig(file="b"), tmp_path, 1)]
    path = toy_trainer(tmp_path, monitors=two).fit().checkpoint
    assert sorted(read(path).shared["monitors"]) == ["JsonlMonitor 0", "JsonlMonitor 1"]

    health = HealthMonitor(HealthConfig(), tmp_path, 1)
    assert toy_trainer(tmp_path, monitors=[health, two[0]]).fit().progress.step == 9


@pytest.mark.requirement("G-7")
def test_two_processes_resume_bit_identical_and_sharded_runs_write_the_same_checkpoint(tmp_path: Path) -> None:
    """DDP and FSDP2 on gloo, broken off after step 5; random numbers differ between ranks. Then, in the worker itself:
    a signal to one rank stops both after the same step, and a bad row of one rank is the error of both."""
    launch("tests.unit.engine.resume_worker", [str(tmp_path)])

    found = {strategy: outcome(tmp_path / strategy / "broken") for strategy in ("ddp", "fsdp")}
    for strategy, values in found.items():
        assert_identical(values, outcome(tmp_path / strategy / "whole"), strategy)
        first, second = values["ranks"]
        assert not torch.equal(first["random"]["torch"], second["random"]["torch"])
    assert_identical(outcome(tmp_path / "ddp" / "stopped"), outcome(tmp_path / "ddp" / "whole"))
    for name, tensor in found["ddp"]["weights"].items():
        torch.testing.assert_close(tensor, found["fsdp"]["weights"][name], rtol=1e-5, atol=1e-6)
    assert found["ddp"]["optimizer"]["state"].keys() == found["fsdp"]["optimizer"]["state"].keys()
    assert found["fsdp"]["optimizer"]["state"]["embedding.weight"]["exp_avg"].shape == (11, 8)
