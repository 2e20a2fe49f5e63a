"""`torchrun ... triptych train`: DDP and FSDP2 end with the same model as one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.commands import triptych, write
from tests.invariants.launch import launch
from tests.recipes.tiny_recipes import tune, write_files


def recipe(folder: Path, strategy: str, micro_batch: int | str = 2) -> Path:
    """Two steps in full, and with LoRA on the language model; no dropout, for it differs between processes."""
    values = tune(write_files(folder / "files"))
    model: dict[str, Any] = values["model"]
    for part in ("vision", "language"):
        model[part] = {**model[part], "config": {**model[part]["config"], "attention_dropout": 0.0}}
    return write(
        folder / f"{strategy}.yaml",
        {"output": str(folder / strategy), **values},
        loader={"global_batch": 8, "micro_batch": micro_batch, "epochs": None, "steps": 2},
        tuning=[
            {"match": "vision", "method": "full"},
            {"match": "connector", "method": "full"},
            {"match": "language", "method": "lora", "rank": 4},
        ],
        evaluation={"answers": True, "max_new_tokens": 2, "show": 2},
        train={
            "runtime": {"strategy": strategy, "precision": "fp32"},
            # Adam turns a rounding difference of a vanishing gradient into a whole step.
            "optimizer": {"kind": "adamw", "eps": 1e-4},
        },
    )


def same_model(run: Path, other: Path) -> None:
    """Two runs ended with the same weights, but for rounding."""
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert found.keys() == expected.keys()
    for name, item in expected.items():
        torch.testing.assert_close(found[name], item, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_end_with_the_model_of_one(strategy: str, tmp_path: Path) -> None:
    single = triptych("train", recipe(tmp_path, "single"))
    assert single.status == 0, single.err
    launch("triptych.cli", ["train", str(recipe(tmp_path, strategy))])
    assert (tmp_path / strategy / "finished.json").is_file()
    same_model(tmp_path / strategy, tmp_path / "single")
    adapters = [load_file(path) for path in sorted((tmp_path / strategy / "adapters").rglob("*.safetensors"))]
    assert adapters and all(item.isfinite().all() for weights in adapters for item in weights.values())
    AutoModelForImageTextToText.from_pretrained(tmp_path / strategy / "model")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_agree_on_the_micro_batch_they_measure(strategy: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, strategy, "auto")
    launch("triptych.cli", ["train", str(file)])
    found = json.loads((tmp_path / strategy / "micro_batch.json").read_text())
    expected = load_file(tmp_path / strategy / "model" / "model.safetensors")
    told = ["loader.micro_batch=null", f"loader.micro_batch_tokens={found['tokens']}", f"output={tmp_path / 'told'}"]
    launch("triptych.cli", ["train", str(file), *told])
    for name, item in load_file(tmp_path / "told" / "model" / "model.safetensors").items():
        assert torch.equal(item, expected[name]), name


def pipeline(folder: Path, strategy: str, questions: str = "test.json") -> Path:
    """A stage, an evaluation of its model, and a stage that goes on from it, all inside the folder."""
    first = recipe(folder, strategy)
    values = yaml.safe_load(first.read_text())
    write(folder / "again.yaml", {**values, "model": {"from": "unset"}, "template": "model"})
    asked = {**values["data"][0], "path": str(folder / "files" / "data" / questions)}
    runs = [{"name": "first", "model": "unset", "limit": 3}]
    evaluation = {"kind": "evaluation", "output": "x", "data": {"test": asked}, "runs": runs, "max_new_tokens": 2}
    write(folder / "evaluation.yaml", evaluation)
    stages = [
        {"name": "first", "recipe": first.name},
        {"name": "answers", "recipe": "evaluation.yaml", "init": {"runs[0].model": "first"}},
        {"name": "again", "recipe": "again.yaml", "init": {"model.from": "first"}},
    ]
    return write(folder / "all.yaml", {"kind": "pipeline", "output": str(folder / "all"), "stages": stages})


def test_two_processes_stay_together_through_a_pipeline(tmp_path: Path) -> None:
    """Each stage ends with the model of one process; the main process answers alone, and prints alone."""
    single = triptych("train", pipeline(tmp_path / "one", "single"))
    assert single.status == 0, single.err
    main, other = launch("triptych.cli", ["train", str(pipeline(tmp_path / "two", "ddp"))])
    for stage in ("first", "again"):
        same_model(tmp_path / "two" / "all" / stage, tmp_path / "one" / "all" / stage)
    assert "3 questions of test" in main and "3/3 again" in main
    assert "questions of test" not in other and "3/3 again" not in other


def test_what_fails_on_the_main_process_ends_both_with_the_status_of_an_error(tmp_path: Path) -> None:
    file = pipeline(tmp_path, "ddp", "spoilt.json")
    data = tmp_path / "files" / "data"
    rows = json.loads((data / "test.json").read_text())
    (data / "spoilt.json").write_text(json.dumps([*rows[:2], {**rows[2], "conversations": []}]))
    outputs = launch("triptych.cli", ["train", str(file)], status=1)
    assert all("spoilt.json" in output and "error: " in output for output in outputs)
    assert not (tmp_path / "all" / "again" / "model").exists()


def test_what_the_main_process_cannot_write_is_said_by_both(tmp_path: Path) -> None:
    file = recipe(tmp_path, "ddp")
    (tmp_path / "ddp" / "recipe.yaml").mkdir(parents=True)
    outputs = launch("triptych.cli", ["train", str(file)], status=1)
    assert all("error: " in output and "recipe.yaml" in output for output in outputs)


def test_a_fault_of_one_process_ends_it_with_status_1_and_its_traceback(tmp_path: Path) -> None:
    """Here the others, which wait for it, fail for its lost connection."""
    file = pipeline(tmp_path, "ddp")
    launch("triptych.cli", ["train", str(file)])
    stamp = tmp_path / "all" / "answers" / "first-test.json"
    stamp.write_text("spoilt")
    main, other = launch("triptych.cli", ["train", str(file)], status=1)
    assert "JSONDecodeError" in main and "Traceback" in other


def test_other_commands_are_refused_in_several_processes() -> None:
    outputs = launch("triptych.cli", ["doctor"], status=1)
    assert all("`doctor` runs in one process, and 2 were launched" in output for output in outputs)
