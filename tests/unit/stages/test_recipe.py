"""The schema of recipes, and the recipes that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import RECIPES, Files
from triptych.core.errors import ConfigError


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


PAIRS, ROWS = {"format": "preference", "path": "pairs.json"}, {"format": "llava", "path": "rows.json"}


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        ("language", PAIRS, "hold answers to compare: use them in a recipe of stage preference"),
        ("contrastive", PAIRS, "hold answers to compare: use them in a recipe of stage preference"),
        ("dpo", ROWS, "rows of format `llava` hold no answers to compare: use format `preference`, or stage tune"),
    ],
)
def test_rows_of_the_wrong_shape_are_refused_with_their_line(
    kind: str, wrong: dict[str, str], said: str, files: Files, tmp_path: Path
) -> None:
    values = {"output": "run", **RECIPES[kind](files)}
    sections = {"data": [*values["data"], dict(wrong)], "evaluation": {"data": [dict(wrong)]}}
    file = write(tmp_path / "recipe.yaml", {**values, **sections})
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    lines = [
        number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith(f" {wrong['path']}")
    ]
    assert [problem.line for problem in caught.value.problems] == [number - 1 for number in lines]
    assert {problem.key for problem in caught.value.problems} == {
        f"data[{len(values['data'])}]",
        "evaluation.data[0]",
    }
    assert str(caught.value).count(said) == 2


@pytest.mark.parametrize("kind", RECIPES)
def test_auto_is_for_rows_of_tokens(kind: str, files: Files, tmp_path: Path) -> None:
    values = {"output": "run", **RECIPES[kind](files)}
    file = write(tmp_path / "recipe.yaml", values)
    overrides = ("loader.micro_batch=auto", "train.memory_limit=2 GB")
    if kind != "contrastive":
        recipe = read_recipe(file, *overrides)
        assert (recipe.loader.micro_batch, recipe.train.memory_limit) == ("auto", "2 GB")
        with pytest.raises(ConfigError, match=r"train.memory_limit: `2 potatoes` is neither a share of the memory"):
            read_recipe(file, "train.memory_limit=2 potatoes")
        return
    with pytest.raises(ConfigError) as caught:
        read_recipe(file, *overrides)
    (problem,) = caught.value.problems
    assert problem.key == "loader" and "set `micro_batch` to a number of samples" in problem.message


@pytest.mark.parametrize("kind", ["contrastive", "dpo"])
def test_answers_are_for_models_that_are_tuned_to_answer(kind: str, files: Files, tmp_path: Path) -> None:
    values = {"output": "run", **RECIPES[kind](files)}
    evaluation = {"data": values["data"], "answers": True, "show": 3}
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path / "recipe.yaml", values, evaluation=evaluation))
    assert [problem.key for problem in caught.value.problems] == ["evaluation.answers", "evaluation.show"]
