"""The folder on disk is the model in memory, or the export says so."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import noise, tiny_family
from triptych.core.errors import ModelError
from triptych.export import plain_probe
from triptych.export.parity import Parity, expect, verify
from triptych.models.generation import Prompt, prompt_inputs
from triptych.models.load import LoadedVlm, VlmConfig, load_vlm, save_vlm


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Python and importing transformers takes seconds; `triptych export` is tested in a fresh process."""

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        try:
            plain_probe.main(*command[2:5], int(command[5]))
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def saved(folder: Path, family: str = "llava") -> LoadedVlm:
    for item in tiny_family(family):
        item.save_pretrained(folder / "base")
    loaded = load_vlm(VlmConfig.model_validate({"from": str(folder / "base")}))
    save_vlm(loaded, folder / "model")
    return loaded


def probe(loaded: LoadedVlm) -> dict[str, torch.Tensor]:
    ids = [5, *loaded.pictures.token_ids(40, 30), 6, 7]
    return prompt_inputs(loaded.model, [Prompt(torch.tensor(ids), (noise(40, 30),))], loaded.pictures, pad=0)


def compare(loaded: LoadedVlm, folder: Path, max_new_tokens: int = 4) -> Parity:
    inputs = probe(loaded)
    return verify(expect(loaded.model, inputs, max_new_tokens), folder, inputs, max_new_tokens=max_new_tokens)


def test_another_weight_on_disk_is_found_and_the_modes_stay(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    loaded.model.train()
    parity = compare(loaded, tmp_path / "model")
    assert parity.logit_difference < 1e-6 and parity.same_answer and len(parity.answer) <= 4
    assert loaded.model.training
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    (head,) = [name for name in weights if name.endswith("lm_head.weight")]
    weights[head] = weights[head] * 1.01
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="plain transformers loads another model: logits differ by 1"):
        compare(loaded, tmp_path / "model")


def test_a_folder_that_does_not_load_is_an_error_with_the_reason(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="plain transformers cannot load the folder"):
        compare(loaded, tmp_path / "model")


def test_a_family_without_a_processor_here_is_compared_all_the_same(tmp_path: Path) -> None:
    loaded = saved(tmp_path, "qwen3_vl")
    assert compare(loaded, tmp_path / "model", 3).processor == {}
