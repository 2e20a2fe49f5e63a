"""Errors from deep inside name the line of the recipe they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import triptych, write
from tests.recipes.tiny_recipes import Files, contrastive, tune
from triptych.core.config import load_tree
from triptych.core.errors import ModelError, Problem
from triptych.stages.locate import at_key, in_recipe


def test_a_key_becomes_a_place_and_what_has_one_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {}\ntuning:\n  - match: a\n  - match: b\n")
    given = [Problem("one", key="tuning[1].match"), Problem("two", file="x", line=7, key="id"), Problem("three")]
    with pytest.raises(ModelError) as caught, in_recipe(load_tree(file, ["tuning.0.match=c"])), at_key("model"):
        raise ModelError([*given, Problem("four", key="tuning[0].match")])
    places = [(item.message, item.file, item.line, item.key) for item in caught.value.problems]
    assert places == [
        ("one", str(file), 4, "tuning[1].match"),
        ("two", "x", 7, "id"),
        ("three", str(file), 1, "model"),
        ("four", "command line", None, "tuning[0].match"),
    ]


@pytest.mark.parametrize("command", ["train", "check"])
def test_models_tuning_and_mixture_are_placed(command: str, files: Files, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), **tune(files)}
    rules = [*values["tuning"][:2], {"match": "languge", "method": "full"}]
    done = triptych(command, write(tmp_path / "recipe.yaml", values, tuning=rules))
    assert done.status == 1 and "recipe.yaml:" in done.err and "tuning[2]" in done.err
    done = triptych(command, write(tmp_path / "recipe.yaml", values), "model.vision.config.hidden_sizes=33")
    assert done.status == 1 and "no field `hidden_sizes`" in done.err and "did you mean `hidden_size`" in done.err
    assert "recipe.yaml:" in done.err and ": model: " in done.err
    data = [{**contrastive(files)["data"][0], "weight": weight} for weight in (0.5, None)]
    done = triptych(command, write(tmp_path / "recipe.yaml", values, data=data))
    assert done.status == 1 and "data[1].weight" in done.err and "recipe.yaml:" in done.err
