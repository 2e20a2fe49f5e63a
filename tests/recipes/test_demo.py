"""The demo's path with a few steps a stage: killed at random it ends as if left alone, and transformers loads it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.recipes.command_server import CommandServer
from tests.recipes.test_kill_resume import log_lines, outcome, same, succeed

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("towers", "align", "instruct")


def _demo(server: CommandServer, folder: Path, kills: int = 0, seconds: float = 0.0) -> tuple[float, list[float]]:
    """Run the pipeline in `folder` until it ends; returns how long its last life took, and when it was killed."""
    folder.mkdir()
    scenes = ["scenes", "runs/demo/data", "-n", "200", "--test", "4"]
    succeed(server.run(scenes, folder / "scenes.log"))
    generator = random.Random("demo")
    killed: list[float] = []
    saved: list[int] = []
    while True:
        after = generator.uniform(0, seconds) if len(killed) < kills else None
        command = ["train", str(ROOT / "recipes/demo/demo-fast.yaml")]
        result = server.run(command, folder / f"train-{len(killed)}.log", after)
        if not result.was_killed:
            succeed(result)
            assert len(killed) == kills, f"the run ended before it was killed {kills} times: {killed}"
            assert not kills or saved[-1] > 0, f"no kill left a checkpoint to resume from: {killed}"
            return result.seconds, killed
        killed.append(after or 0.0)
        saved.append(len(list(folder.glob("runs/*/*/checkpoints/step-*"))))


@pytest.mark.slow
@pytest.mark.requirement("G-7")
def test_three_kills_change_no_bit_and_transformers_alone_gives_the_same_answers(
    server: CommandServer, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seconds, _ = _demo(server, whole)
    _, killed = _demo(server, broken, kills=3, seconds=seconds / 2)
    for stage in STAGES:
        one, other = (outcome(folder / "runs/demo-fast" / stage) for folder in (whole, broken))
        assert list(one) == list(other)
        for name, value in one.items():
            assert same(value, other[name]), f"{stage}: {name} differs; killed after {killed}"
        assert log_lines(whole / "runs/demo-fast" / stage) == log_lines(broken / "runs/demo-fast" / stage)
    answers = sorted((whole / "runs/demo-fast/evaluation").glob("*.jsonl"))
    assert len(answers) == 5
    for file in answers:
        assert file.read_bytes() == (broken / "runs/demo-fast/evaluation" / file.name).read_bytes(), file.name
    model = whole / "runs/demo-fast/instruct/model"
    assert load_file(model / "model.safetensors")
    command = [sys.executable, str(ROOT / "tests/recipes/plain_answers.py"), str(model)]
    asked = whole / "runs/demo-fast/evaluation/after-test.jsonl"
    done = subprocess.run(
        [*command, str(asked), str(whole / "runs/demo/data/pictures")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 of 10 answers differ" in done.stdout
