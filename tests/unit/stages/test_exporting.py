"""`export`: a plain Hugging Face folder that is the trained model, or an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from tests.commands import triptych, write
from tests.recipes.tiny_recipes import Files, contrastive, tune
from tests.unit.stages.conftest import Run
from triptych.core.errors import ConfigError
from triptych.export.parity import Parity
from triptych.stages import exporting, saving
from triptych.stages.exporting import find_checkpoint, in_float32


def test_a_run_that_began_from_a_whole_model_is_exported_too(lora_run: Run, files: Files, tmp_path: Path) -> None:
    """Its recipe with every default filled in, which stands in the run's folder, is a recipe as well."""
    values = {"output": str(tmp_path / "run"), **tune(files), "model": {"from": str(lora_run.output / "model")}}
    del values["template"]
    changes = {"loader": {"global_batch": 8, "micro_batch": 8, "epochs": 1}, "max_length": 256}
    done = triptych("train", write(tmp_path / "recipe.yaml", values, **changes))
    assert done.status == 0, done.err
    exported = triptych("export", tmp_path / "run", "--output", tmp_path / "export")
    assert exported.status == 0, exported.err
    again = triptych("train", tmp_path / "run" / "recipe.yaml")
    assert again.status == 0, again.err


def test_export_merges_and_plain_transformers_agrees(lora_run: Run, tmp_path: Path) -> None:
    done = triptych("export", lora_run.output, "--output", tmp_path / "export")
    assert done.status == 0, done.err
    assert "plain transformers gives the same greedy answer" in done.out
    assert {"chat_template.jinja", "processor_config.json", "tokenizer.json"} <= {
        item.name for item in (tmp_path / "export").iterdir()
    }
    exported = load_file(tmp_path / "export" / "model.safetensors")
    finished = load_file(lora_run.output / "model" / "model.safetensors")
    assert exported.keys() == finished.keys()
    # The finished model is the best checkpoint too.
    assert all(torch.allclose(exported[name], item, atol=1e-6) for name, item in finished.items())


def test_another_checkpoint_gives_another_model(lora_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Verified in a fresh process above, which takes seconds.
    monkeypatch.setattr(exporting, "check_parity", lambda *_: Parity(0.0, True, [], {}))
    done = triptych("export", lora_run.output, "--checkpoint", "step-00000002", "--output", tmp_path / "export")
    assert done.status == 0, done.err
    exported = load_file(tmp_path / "export" / "model.safetensors")
    checkpoint = load_file(lora_run.output / "checkpoints" / "step-00000002" / "weights.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    (projector,) = [item for key, item in exported.items() if key.endswith("multi_modal_projector.linear_1.weight")]
    assert torch.equal(projector, checkpoint[f"hf.{name}"])


def test_best_falls_back_to_last_and_names_are_corrected(tmp_path: Path) -> None:
    for name in ("step-00000004", "last"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "best") == tmp_path / "last"
    with pytest.raises(ConfigError, match=r"no checkpoint `step-0000004`(?s:.*)did you mean `step-00000004`"):
        find_checkpoint(tmp_path, "step-0000004")
    with pytest.raises(ConfigError, match=r"no checkpoint `best`(?s:.*)train first"):
        find_checkpoint(tmp_path / "nowhere", "best")


def test_a_checkpoint_of_other_weights_is_refused(lora_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run.output, run, symlinks=True)
    file = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    weights: dict[str, Any] = load_file(file)
    weights["hf.other"] = weights.pop(next(iter(weights)))
    save_file(weights, file)
    refused = triptych("export", run, "--checkpoint", "step-00000003")
    assert refused.status == 1 and "Traceback" not in refused.err
    assert "error:" in refused.err


@pytest.mark.parametrize("inner", ["", "model", "checkpoints", "adapters"])
def test_an_export_replaces_nothing_of_the_run(inner: str, lora_run: Run) -> None:
    refused = triptych("export", lora_run.output, "--output", lora_run.output / inner)
    assert refused.status == 1 and "this folder belongs to the run" in refused.err
    assert f"use e.g. {lora_run.output / 'export'}" in refused.err


def test_an_export_needs_everything_that_was_trained(lora_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run.output, run, symlinks=True)
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["tuning"][-1] = {"match": "language", "method": "full"}  # the checkpoint holds no weights of it
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    refused = triptych("export", run, "--checkpoint", "last")
    assert refused.status == 1 and "not in the checkpoint" in refused.err and not (run / "export").exists()


def test_a_wrong_merge_is_found(lora_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = saving.merge_adapters

    def merge_wrongly(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-500)  # three steps leave the adapters of a tiny model small
        return merge(model)

    monkeypatch.setattr(saving, "merge_adapters", merge_wrongly)
    done = triptych("export", lora_run.output, "--output", tmp_path / "export")
    assert done.status == 1 and "plain transformers loads another model: logits differ by" in done.err


def test_a_dual_encoder_is_exported_and_compared(files: Files, tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **contrastive(files)})
    assert triptych("train", recipe).status == 0
    done = triptych("export", tmp_path / "run", "--checkpoint", "last")
    assert done.status == 0, done.err
    assert "plain transformers gives the same similarities as the model in training" in done.out
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    finished = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() == finished.keys()
    assert all(torch.equal(exported[name], item) for name, item in finished.items())


def test_computing_in_float32_leaves_every_type_and_value() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    before = model.weight.data.clone()
    with in_float32(model):
        assert model.weight.dtype == torch.float32
    assert model.weight.dtype == torch.bfloat16 and torch.equal(model.weight.data, before)
