"""What the stages share: names of parameters, data sets, dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import Files, tune
from triptych.core.errors import DataError, TriptychError
from triptych.core.types import Message, Origin, Pair, Preference, Sample, Text
from triptych.data.formats import LlavaConfig
from triptych.stages.build import (
    make_held_out_loader,
    make_loader,
    open_datasets,
    pair_rows,
    plain_rows,
    preflight,
    resolved,
    torch_dtype,
)
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
    loader = make_loader(
        built.datasets, built.encode, built.pictures, recipe.loader, tmp_path, by_picture=True, packed=True
    )
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


def test_rows_of_the_wrong_shape_name_their_place() -> None:
    message = Message("user", (Text("who?"),))
    plain = Sample((message,), Origin("a.json", 3))
    pair = replace(plain, preference=Preference(((message,), (message,)), (Pair(0, 1),)))
    kept: list[Sample] = []
    plain_rows(kept.append)(plain)  # type: ignore[arg-type]
    pair_rows(kept.append)(pair)  # type: ignore[arg-type]
    assert kept == [plain, pair]
    with pytest.raises(DataError, match=r"a.json:3: the row holds answers to compare(?s:.*)stage preference"):
        plain_rows(kept.append)(pair)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a.json:3: the row holds no answers to compare(?s:.*)stage tune"):
        pair_rows(kept.append)(plain)  # type: ignore[arg-type]
    assert len(kept) == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.schedule={kind: three_phase, warmup: 8, cooldown: 8}", "do not fit into 10 steps"),
        ("train.optimizer={max_component_norms: {visoin: 1.0}}", "visoin"),
        ("data.0.weight=0.5", None),
        ("train.runtime.activation_checkpointing=[9]", "blocks .* do not exist"),
    ],
)
def test_what_training_would_refuse_is_refused_before(
    override: str, said: str | None, files: Files, tmp_path: Path
) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", {"output": "run", **tune(files)}), override)
    built = build_tune(recipe)
    if said is None:
        preflight(recipe, built)
        return
    with pytest.raises(TriptychError, match=said):
        preflight(recipe, built)
