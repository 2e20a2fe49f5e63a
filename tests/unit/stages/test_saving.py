"""The finished model is whole and merged; its adapters stand beside it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import Files, preference
from triptych.core.errors import TrainingError
from triptych.stages.saving import is_sharded, save_finished
from triptych.stages.vlm import build_vlm


def test_a_merged_folder_and_the_adapters_on_their_own(files: Files, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", {"output": "run", **preference(files)}))
    vlm = build_vlm(recipe)
    model = vlm.loaded.model
    assert not is_sharded(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits

    def rebuild() -> None:
        pytest.fail("nothing is sharded, so nothing needs to be built again")

    save_finished(tmp_path / "run" / "model", vlm.loaded, rebuild)  # type: ignore[arg-type]
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    adapters = tmp_path / "run" / "adapters"
    assert {item.name for item in adapters.iterdir()} >= {"lora-rank4-alpha8", "lora-rank2-alpha4"}
    assert (adapters / "lora-rank4-alpha8" / "adapter_model.safetensors").is_file()


def test_a_full_disk_is_named_with_its_remedy(files: Files, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; safetensors has an error of its own for it."""
    vlm = build_vlm(read_recipe(write(tmp_path / "recipe.yaml", {"output": "run", **preference(files)})))
    (tmp_path / "run").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"finished model cannot be written: .* GiB free") as caught:
            save_finished(tmp_path / "run" / "model", vlm.loaded, lambda: vlm.loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (problem,) = caught.value.problems
    assert problem.file == str(tmp_path / "run" / "model") and "make room" in str(problem.remedy)


def test_a_folder_that_cannot_be_made_is_named(files: Files, tmp_path: Path) -> None:
    vlm = build_vlm(read_recipe(write(tmp_path / "recipe.yaml", {"output": "run", **preference(files)})))
    (tmp_path / "run").write_text("a file")
    with pytest.raises(TrainingError, match=r"finished model cannot be written: .*Not a directory"):
        save_finished(tmp_path / "run" / "model", vlm.loaded, lambda: vlm.loaded)
