"""`triptych train` with `stage: preference`: where the reference comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import FP32, read_recipe, triptych, write
from tests.recipes.tiny_recipes import Files, preference
from triptych.core.errors import ModelError
from triptych.models.reference import AdapterOffReference, FrozenReference
from triptych.stages.preference import build_preference

FULL = [{"match": part, "method": "full"} for part in ("connector", "language")]


def recipe(files: Files, folder: Path, **changes: Any) -> Path:
    values = {"output": str(folder / "run"), **preference(files)}
    loader = {"global_batch": 8, "micro_batch": 4, "epochs": 1}
    return write(folder / "recipe.yaml", values, **{"loader": loader, "train": {"save_every": None}, **changes})


def test_auto_keeps_a_sharded_model_sharded(files: Files, tmp_path: Path) -> None:
    """Where adapters are all that trains; without them a whole copy is needed either way."""
    adapters = build_preference(read_recipe(recipe(files, tmp_path / "a", train={"runtime": {"strategy": "fsdp"}})))
    assert isinstance(adapters.reference, AdapterOffReference)
    tuning = [{"match": "vision", "method": "frozen"}, *FULL]
    changes = {"tuning": tuning, "train": {"runtime": {"strategy": "fsdp"}}}
    full = build_preference(read_recipe(recipe(files, tmp_path / "b", **changes)))
    assert full.reference is None and full.passes_before == 1  # computed before training
    assert any(note.startswith("reference: precomputed") for note in full.notes)
    single = build_preference(read_recipe(recipe(files, tmp_path / "c")))
    assert single.reference is None and single.passes_before == 1


@pytest.mark.parametrize("kind", ["adapter_off", "frozen", "precomputed"])
def test_training_starts_at_the_reference_and_prefers_the_chosen_answers(
    kind: str, files: Files, tmp_path: Path
) -> None:
    held_out = {"data": preference(files)["data"]}
    changes: dict[str, Any] = {}
    if kind != "adapter_off":
        model = preference(files)["model"]
        language = {**model["language"], "config": {**model["language"]["config"], "attention_dropout": 0.0}}
        tuning = [{"match": "vision", "method": "frozen"}, *FULL]
        changes = {"tuning": tuning, "model": {**model, "language": language}}
    changes["reference"] = kind
    file = recipe(files, tmp_path, evaluation=held_out, **changes)
    done = triptych("train", file, FP32)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    if kind != "adapter_off":  # no dropout there: policy and reference are equal at first, -log sigmoid(0)
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < losses[0]
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["evaluation"]["loss"] < 0.69
    assert (tmp_path / "run" / "adapters").exists() == (kind == "adapter_off")


def test_auto_computes_before_training_where_every_row_is_used(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path)
    assert build_preference(read_recipe(file)).reference is None
    assert build_preference(read_recipe(file, "loader.epochs=0.5")).reference is not None
    steps = ["loader.epochs=null", "loader.steps=3"]  # of 8 pairs: all 24
    assert build_preference(read_recipe(file, *steps)).reference is None
    steps = ["loader.epochs=null", "loader.steps=2"]
    assert build_preference(read_recipe(file, *steps)).reference is not None


def test_auto_takes_the_adapters_off_where_they_are_all_that_trains(files: Files, tmp_path: Path) -> None:
    few = "loader.epochs=0.5"
    assert isinstance(build_preference(read_recipe(recipe(files, tmp_path), few)).reference, AdapterOffReference)
    rules = [{"match": "connector", "method": "full"}, *preference(files)["tuning"]]
    rules = [rule for rule in rules if rule != {"match": "connector", "method": "frozen"}]
    mixed = recipe(files, tmp_path, tuning=rules)
    assert isinstance(build_preference(read_recipe(mixed, few)).reference, FrozenReference)
    with pytest.raises(ModelError, match="`connector` train base weights"):
        build_preference(read_recipe(mixed, "reference=adapter_off"))


def test_a_misspelt_reference_is_one_problem(files: Files, tmp_path: Path) -> None:
    refused = triptych("train", recipe(files, tmp_path), "reference=precompute")
    assert refused.status == 1 and refused.err.count("reference") == 1 and "precomputed" in refused.err
