"""A training step of every stage: bf16 autocast, accumulation, clipping, schedule, and the metrics of its objective."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.tiny_recipes import RECIPES, Files, write_files, write_recipe
from triptych.stages.pipeline import train

METRICS = {
    "language": {"supervised_tokens_per_row"},
    "contrastive": {"acc_i2t", "acc_t2i", "logit_scale"},
    "dpo": {"reward_margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logprob"},
}
STEPS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


def run(name: str, files: Files, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    recipe = RECIPES[name](files)
    recipe |= {"output": str(folder / "run"), "loader": {"global_batch": 7, "micro_batch": 3, "steps": STEPS}}
    recipe.pop("evaluation", None)
    recipe["train"] = {"log_every": 1, "save_every": None, "schedule": {"kind": "linear", "warmup": 2}, **settings}
    train(write_recipe(folder / f"{name}.yaml", recipe))
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "step"]


@pytest.mark.requirement("B-7", "B-13", "H-31")
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_step_clips_schedules_accumulates_and_reports(name: str, files: Files, tmp_path: Path) -> None:
    steps = run(name, files, tmp_path, runtime={"precision": "bf16"}, optimizer={"max_gradient_norm": 1e-3})
    # 24 rows, 7 at a time: the last window of an epoch is smaller, never dropped or filled up.
    assert [record["samples"] for record in steps] == ([7, 7, 7, 3] * 2 if name != "contrastive" else [7] * 6 + [6, 7])
    for index, record in enumerate(steps):
        assert math.isfinite(record["loss"]) and METRICS[name] <= set(record["metrics"])
        assert record["gradient_norm"] > 1e-3  # reported before clipping
        # Two steps of warm-up, then a straight line to zero at the end.
        factor = (index + 1) / 3 if index < 2 else 1 - (index - 2) / (STEPS - 2)
        assert list(record["learning_rates"].values()) == pytest.approx(
            [3.0e-3 * factor] * len(record["learning_rates"])
        )


@pytest.mark.requirement("B-7", "B-13", "H-31")
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_loss_falls(name: str, files: Files, tmp_path: Path) -> None:
    steps = run(name, files, tmp_path, runtime={"precision": "fp32"}, schedule={"kind": "constant"})
    assert steps[-1]["loss"] < steps[0]["loss"]
