"""Tiny data, and runs that several tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import triptych, write
from tests.recipes.tiny_recipes import Files, tune, write_files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """24 training and 24 test pictures with questions, captions and preference pairs."""
    return write_files(tmp_path_factory.mktemp("files"))


@dataclass(frozen=True)
class Run:
    """A finished run."""

    recipe: Path
    output: Path
    out: str
    """What it printed."""


@pytest.fixture(scope="session")
def lora_run(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA on layer ranges, added tokens, the Vicuna template, held-out answers, a best metric."""
    folder = tmp_path_factory.mktemp("lora")
    values = {"output": str(folder / "run"), **tune(files)}
    values["model"] = {**values["model"], "tokens": {"names": ["<box>", "</box>"]}}
    values["tuning"] = [
        {"match": "vision", "method": "frozen"},
        {"match": "connector", "method": "full"},
        {"match": "language.layers[0:1]", "method": "lora", "rank": 4},
        {"match": "language.layers[1:2]", "method": "lora", "rank": 2},
        {"match": "language", "method": "frozen"},
    ]
    changes = {
        "template": "vicuna_v1",
        "max_length": 256,
        "loader": {"global_batch": 8, "micro_batch": 4, "epochs": 1},
        "evaluation": {"answers": True, "max_new_tokens": 3, "show": 2, "batch": 8},
        "train": {"save_every": 1, "evaluate_every": 1, "runtime": {"precision": "fp32"}},
    }
    recipe = write(folder / "recipe.yaml", values, **changes)
    done = triptych("train", recipe)
    assert done.status == 0, done.err
    return Run(recipe, folder / "run", done.out)
