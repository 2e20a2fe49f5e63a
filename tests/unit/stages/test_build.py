"""What the stages share: names of parameters, data sets, dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import Files, tune
from triptych.core.errors import DataError
from triptych.data.formats import LlavaConfig
from triptych.stages.build import make_held_out_loader, make_loader, open_datasets, resolved, torch_dtype
from triptych.stages.tune import build_tune


def test_groups_and_blocks_are_named_as_in_the_scorer(files: Files, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **tune(files)}))
    built = build_tune(recipe)
    parameters = dict(built.scorer.named_parameters())
    named = {name: item for group in built.groups for name, item in group.parameters.items()}
    assert named.keys() == parameters.keys()
    assert all(parameters[name] is item for name, item in named.items())
    assert len(built.blocks) == 4 and all(built.scorer.get_submodule(path) for path in built.blocks)
    assert resolved(recipe)["loader"]["seed"] == 0 and "from" in resolved(recipe)["model"]
    loader = make_loader(built.datasets, built.encode, built.pictures, recipe.loader, tmp_path)
    assert loader.total_windows == 10  # 2 epochs of 24 rows by 5
    held_out = make_held_out_loader(built.datasets, built.encode, built.pictures, 7)
    (window,) = held_out.windows()
    assert [batch.num_examples for batch in window.batches] == [7, 7, 7, 3]


def test_everything_that_cannot_be_opened_is_reported_at_once(files: Files, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    paths = [tmp_path / "nope.json", files.data / "train.json", tmp_path / "empty.json"]
    with pytest.raises(DataError) as caught:
        open_datasets([LlavaConfig(format="llava", path=str(path)) for path in paths])
    assert len(caught.value.problems) == 2
    assert "nope.json" in str(caught.value) and "no rows" in str(caught.value)


def test_dtypes() -> None:
    assert [torch_dtype(name) for name in ("float32", "bfloat16", "float64")] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
