"""The schema of recipes, and the recipes that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import RECIPES, Files
from triptych.core.config import load_tree
from triptych.core.errors import ConfigError
from triptych.stages import STAGES
from triptych.stages.pipeline import stage_trees

SHIPPED = sorted((Path(__file__).parents[3] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid(file: Path) -> None:
    for _, tree, _ in stage_trees(load_tree(file)):
        schema, _ = STAGES[tree.values["stage"]]
        schema.model_validate(tree.values)


@pytest.mark.parametrize("kind", RECIPES)
def test_unknown_keys_are_refused_all_at_once(kind: str, files: Files, tmp_path: Path) -> None:
    values = {"output": "run", **RECIPES[kind](files)}
    values["loader"] = {**values["loader"], "micro_batches": 2, "global_batch": 0}
    file = write(tmp_path / "recipe.yaml", values, wieght_decay=1)
    with pytest.raises(ConfigError) as caught:
        read_recipe(file, "train.sed=3")
    said = str(caught.value)
    assert "did you mean `micro_batch`" in said
    assert "did you mean `weight_decay`?" in said
    assert "train.sed: unknown key `sed`" in said and "did you mean `seed`?" in said
    assert "greater than or equal to 1, got 0" in said


def test_a_recipe_needs_rules_data_and_a_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path / "recipe.yaml", {"stage": "tune", "tuning": [], "lr": 0}))
    keys = {problem.key for problem in caught.value.problems}
    assert {"output", "tuning", "lr", "data", "loader", "model"} <= keys
