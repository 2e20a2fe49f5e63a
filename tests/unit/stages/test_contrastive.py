"""`triptych train` with `stage: contrastive`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from tests.commands import read_recipe, triptych, write
from tests.recipes.tiny_recipes import Files, contrastive
from triptych.core.errors import ModelError
from triptych.stages.contrastive import build_contrastive


def test_it_ends_with_a_dual_encoder_and_its_recall(files: Files, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), **contrastive(files)}
    held_out = [{"format": "captions", "path": str(files.data / "test.csv"), "images": str(files.data / "pictures")}]
    recipe = write(
        tmp_path / "recipe.yaml",
        values,
        loader={"global_batch": 24, "micro_batch": 8, "epochs": None, "steps": 6},
        train={"save_every": None},
        evaluation={"data": held_out, "batch": 10},
        tuning=[
            {"match": "vision", "method": "lora", "rank": 4},
            *({"match": part, "method": "full"} for part in ("projection", "temperature")),
            {"match": "text", "method": "frozen"},
        ],
    )
    done = triptych("train", recipe)
    assert done.status == 0, done.err
    evaluation = json.loads((tmp_path / "run" / "finished.json").read_text())["evaluation"]
    assert set(evaluation) >= {"loss", *(f"recall_{way}@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))}
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert 1 <= float(model.logit_scale.exp()) <= 100
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        text = model.get_text_features(**processor(text=["a dog"], return_tensors="pt")).pooler_output
    assert text.shape == (1, 16)
    exported = triptych("export", tmp_path / "run")
    assert exported.status == 0 and "plain transformers gives the same similarities" in exported.out


def test_captions_longer_than_the_text_tower_takes_are_refused(files: Files, tmp_path: Path) -> None:
    file = write(tmp_path / "recipe.yaml", {"output": "run", **contrastive(files)})
    with pytest.raises(ModelError, match=r"max_length 65 is more than the 64 tokens .* of the text encoder"):
        build_contrastive(read_recipe(file, "max_length=65"))


@pytest.mark.parametrize("arguments", [("check",), ("train", "--dry-run"), ("train",)])
def test_a_sigmoid_loss_without_a_bias_is_refused(arguments: tuple[str, ...], files: Files, tmp_path: Path) -> None:
    file = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **contrastive(files)})
    done = triptych(*arguments, file, "objective.loss=siglip")
    assert done.status == 1 and "command line: objective.loss: loss `siglip` adds a bias" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert build_contrastive(read_recipe(file, "objective.loss=siglip", "model.bias_init=-10"))
