"""A run folder: what is in it, that it resumes, and that another recipe is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands import read_recipe, triptych, write
from tests.recipes.tiny_recipes import Files, tune
from triptych import __version__
from triptych.core.types import Progress
from triptych.engine.trainer import FitResult
from triptych.stages import run as run_module


def recipe(files: Files, folder: Path) -> Path:
    loader = {"global_batch": 8, "micro_batch": 8, "epochs": None, "steps": 2}
    train = {"save_every": 1, "evaluate_every": None, "best": None}
    return write(folder / "recipe.yaml", {"output": str(folder / "run"), **tune(files)}, loader=loader, train=train)


def test_a_dry_run_prints_the_plan_and_writes_nothing(files: Files, tmp_path: Path) -> None:
    done = triptych("train", recipe(files, tmp_path), "--dry-run", "loader.steps=7")
    assert done.status == 0, done.err
    assert "Tuning plan" in done.out and "trainable params: 69,664" in done.out
    assert "24 rows, 24 draws an epoch" in done.out and "7 steps of 8 examples" in done.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_the_real_one_would(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path)
    assert triptych("train", file).status == 0
    planned = triptych("train", file, "--dry-run")
    assert planned.status == 0 and "it would resume at step 2" in planned.out.replace("\n", " ")
    refused = triptych("train", file, "lr=0.5", "--dry-run")
    assert refused.status == 1 and "the recipe changed: lr: 0.003 -> 0.5" in refused.err
    for command in (("check", file), ("train", file, "--dry-run")):
        without = triptych(*command, "train.best={metric: loss}", "evaluation=null", f"output={tmp_path / 'other'}")
        assert without.status == 1 and "`loss` is followed, but nothing evaluates it" in without.err


def test_a_run_says_what_the_recipe_left_open_and_what_has_no_effect(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path)
    for more in ([], ["--dry-run"]):
        done = triptych("train", file, "train.runtime.precision=fp32", "train.memory_limit=1 GiB", *more)
        assert done.status == 0, done.err
        assert "loader.rows_per_picture: up to 1 rows about a picture follow each other" in done.out
        assert "train.memory_limit: 1 GiB has no effect" in done.out
        assert ("precision fp32, strategy single" in done.out) == (not more)
    again = triptych("train", file, "--dry-run", f"output={tmp_path / 'other'}", "loader.rows_per_picture=3")
    assert again.status == 0 and "up to 3 rows" in again.out and "has no effect" not in again.out


def test_an_output_folder_that_cannot_be_made_is_refused_where_training_would_begin(
    files: Files, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    output = tmp_path / "taken" / "run"
    refused = triptych("train", recipe(files, tmp_path), f"output={output}")
    assert refused.status == 1
    assert f"{output}: output: the output folder cannot be written: {tmp_path / 'taken'} is no folder" in refused.err
    assert "give another `output`" in refused.err
    # Both may be for another machine.
    for command, *more in ("check",), ("train", "--dry-run"):
        assert triptych(command, recipe(files, tmp_path), f"output={output}", *more).status == 0


def test_a_finished_run_that_is_started_again_stays_what_later_stages_began_from(files: Files, tmp_path: Path) -> None:
    file, finished = recipe(files, tmp_path), tmp_path / "run" / "finished.json"
    assert triptych("train", file).status == 0
    before = finished.stat().st_mtime_ns
    assert triptych("train", file).status == 0
    assert finished.stat().st_mtime_ns == before


def test_a_full_disk_at_the_end_leaves_no_half_finished_run(files: Files, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; a stage is skipped where there is a `finished.json`."""
    metrics = {f"metric {number}": 0.5 for number in range(10_000)}
    result = FitResult(Progress(2, 2), None, None, False, tmp_path / "checkpoint", metrics)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run_module.write_finished(read_recipe(recipe(files, tmp_path)), tmp_path / "run", result)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [item.name for item in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_a_run_leaves_its_plan_and_environment(files: Files, tmp_path: Path) -> None:
    assert triptych("train", recipe(files, tmp_path)).status == 0
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert [row["method"] for row in facts["tuning"]] == ["full", "full", "full"]
    assert sum(row["trainable"] for row in facts["tuning"]) == 69_664
    assert facts["environment"]["triptych"] == __version__ and facts["environment"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is kept in runs on CPUs")
def test_a_run_keeps_memory_few_kernels_and_asks_for_large_pages(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    capacities: list[str | None] = []

    def keep_memory() -> None:
        seen.append(os.environ.get("THP_MEM_ALLOC_ENABLE"))
        capacities.append(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))

    monkeypatch.setattr(run_module, "keep_memory", keep_memory)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    file = recipe(files, tmp_path)
    assert triptych("train", file, "--dry-run").status == 0 and seen == ["1"]
    assert triptych("train", file, "--dry-run", "train.runtime.keep_memory=false").status == 0 and seen == ["1"]
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert triptych("train", file, "--dry-run").status == 0 and seen == ["1", "0"]
    assert capacities == ["64", "64"]


@pytest.mark.requirement("G-7")
def test_a_run_resumes_and_a_changed_recipe_is_refused_by_its_keys(files: Files, tmp_path: Path) -> None:
    file, run = recipe(files, tmp_path), tmp_path / "run"
    assert triptych("train", file).status == 0
    whole = load_file(run / "model" / "model.safetensors")
    saved = (run / "recipe.yaml").read_text()
    assert yaml.safe_load(saved)["loader"]["on_bad_row"] == "stop"  # defaults are written out

    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "finished.json").unlink()
    refused = triptych("train", file, "lr=0.5", "objective.kind=language", "loader.micro_batch=4")
    assert refused.status == 1 and "Traceback" not in refused.err
    assert "the recipe changed: lr: 0.003 -> 0.5" in refused.err
    assert "the recipe changed: loader.micro_batch: 8 -> 4" in refused.err
    assert (run / "recipe.yaml").read_text() == saved  # the run is still what it was

    resumed = triptych("train", file, "train.log_every=2")
    assert resumed.status == 0, resumed.err
    assert "start at step 1 of 2" in resumed.out
    again = load_file(run / "model" / "model.safetensors")
    assert all((whole[name] == item).all() for name, item in again.items())
    assert json.loads((run / "finished.json").read_text())["steps"] == 2


@pytest.mark.requirement("G-4")
def test_what_a_finished_run_reports_is_of_the_weights_it_saved(files: Files, tmp_path: Path) -> None:
    """The loss falls, so that the largest is the best of `mode: max`: that of the first evaluation."""
    best = ["train.evaluate_every=1", "train.best.metric=loss", "train.best.mode=max"]
    done = triptych("train", recipe(files, tmp_path), *best)
    assert done.status == 0, done.err
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, last = (event["results"] for event in events if event["event"] == "evaluation")
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())

    assert first != last
    assert (finished["best_step"], finished["evaluation"]) == (1, first)
    assert f"loss: {first['loss']:.4g}" in done.out


def test_nothing_of_the_libraries_is_printed(files: Files, tmp_path: Path) -> None:
    done = triptych("train", recipe(files, tmp_path))
    assert done.err == ""
    assert not any(word in done.out for word in ("Loading weights", "Writing model", "kernels", "Warning"))


@pytest.mark.parametrize("weights", ["stochastic", "master"])
def test_bfloat16_weights_resume_to_the_bit(weights: str, files: Files, tmp_path: Path) -> None:
    file, run = recipe(files, tmp_path), tmp_path / "run"
    options = ["dtype=bfloat16", f"train.optimizer.bf16_weights={weights}", "train.save_every=1"]
    done = triptych("train", file, *options)
    assert done.status == 0, done.err
    whole = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert triptych("train", file, *options).status == 0
    again = load_file(run / "model" / "model.safetensors")
    assert whole and all(
        item.dtype == torch.bfloat16 and torch.equal(item, again[name]) for name, item in whole.items()
    )
