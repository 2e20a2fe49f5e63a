"""Adapters on disk, merged, and switched off."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny import tiny_family, token_id
from triptych.core.errors import ModelError
from triptych.models.adapters import (
    adapter_names,
    adapters_disabled,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from triptych.models.components import find_components
from triptych.models.tuning import TuningPlan, apply_tuning
from triptych.models.tuning_rules import FrozenRule, FullRule, LoraRule

TWO = ("lora-rank2-alpha4", "lora-rank4-alpha8")


def llava(tied: bool = False) -> PreTrainedModel:
    model = tiny_family("llava")[0]
    if tied:
        model.config.tie_word_embeddings = True
        model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    return model


def trained(
    model: PreTrainedModel, connector: str = "frozen", tokens: tuple[int, ...] = ()
) -> tuple[PreTrainedModel, TuningPlan]:
    """Two adapters of different settings, every trainable parameter moved away from its start."""
    rules: list[Any] = [
        LoraRule(match="vision", method="lora", rank=2, targets="attention"),
        FullRule(match="connector", method="full")
        if connector == "full"
        else FrozenRule(match="connector", method="frozen"),
        LoraRule(match="language", method="lora", rank=4, train_tokens=tokens),
    ]
    plan = apply_tuning(model, find_components(model), rules, 1e-3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in plan.groups:
            for parameter in group.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, plan


def logits(model: nn.Module) -> Tensor:
    """Logits of a picture between six words; no gradients."""
    words = torch.tensor([[5, 6, 7, *[token_id("<image>")] * 16, 8, 9, 10]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(next(model.parameters()).dtype)
    with torch.no_grad():
        return model(input_ids=words, pixel_values=pixels, use_cache=False).logits


def text_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits


# --- disk --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("E-39")
@pytest.mark.parametrize("tokens", [(), (5, 8)])
def test_plain_peft_loads_each_adapter_onto_the_plain_base(tmp_path: Path, tokens: tuple[int, ...]) -> None:
    base, (model, _) = llava(), trained(llava(), tokens=tokens)
    folders = save_adapters(model, tmp_path)
    assert folders == [tmp_path / name for name in TWO]
    assert not (tmp_path / "trainable.safetensors").exists()
    plain = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=TWO[0])
    plain.load_adapter(str(folders[1]), TWO[1])
    plain.base_model.set_adapter([TWO[0]])
    for layer in plain.modules():  # plain peft activates one adapter; both act on different layers here
        if isinstance(layer, BaseTunerLayer):
            names = {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)}
            layer.set_adapter(sorted(names))
    for wrapper in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        if tokens:
            wrapper.set_adapter([TWO[1]])
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-6, rtol=0)


@pytest.mark.requirement("E-39")
def test_a_single_adapter_needs_nothing_but_from_pretrained(tmp_path: Path) -> None:
    model = llava()
    rules = [LoraRule(match="language", method="lora", rank=4, use_rslora=True), FrozenRule(match="*", method="frozen")]
    apply_tuning(model, find_components(model), rules, 1e-3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.05)
    (folder,) = save_adapters(model, tmp_path)
    plain = PeftModel.from_pretrained(llava(), str(folder))
    assert not torch.equal(logits(model), logits(llava()))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.requirement("E-39")
def test_files_hold_adapters_connector_and_token_rows_only(tmp_path: Path) -> None:
    model, _ = trained(llava(), connector="full", tokens=(5,))
    save_adapters(model, tmp_path)
    vision, language = (load_file(tmp_path / name / "adapter_model.safetensors") for name in TWO)
    assert len(vision) == 2 * 4 * 2  # layers x projections x (A, B)
    assert all(".vision_tower." in key and (".lora_A." in key or ".lora_B." in key) for key in vision)
    rows = {key for key in language if "trainable_tokens" in key}
    assert len(language) == 2 * 7 * 2 + 2 and len(rows) == 2
    assert all(language[key].shape == (1, 32) for key in rows)
    others = load_file(tmp_path / "trainable.safetensors")
    assert set(others) == {
        f"model.multi_modal_projector.linear_{index}.{kind}" for index in (1, 2) for kind in ("weight", "bias")
    }
    config = json.loads((tmp_path / TWO[1] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["inference_mode"] and config["target_modules"] == sorted(config["target_modules"])
    with safe_open(tmp_path / "trainable.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.requirement("E-39", "F-12")
def test_loading_into_a_plain_base_and_into_a_tuned_model_gives_equal_logits(tmp_path: Path) -> None:
    model, _ = trained(llava(), connector="full", tokens=(5, 8))
    save_adapters(model, tmp_path)
    plain = llava()
    assert load_adapters(plain, tmp_path) == TWO == adapter_names(plain)
    assert torch.equal(logits(plain), logits(model))
    fresh, _ = trained(llava(), connector="full", tokens=(5, 8))
    trainable = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_adapters(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert {name for name, parameter in fresh.named_parameters() if parameter.requires_grad} == trainable


def test_float32_adapters_of_a_half_precision_base_are_read_back_exactly(tmp_path: Path) -> None:
    model, _ = trained(llava().to(torch.bfloat16), tokens=(5,))
    save_adapters(model, tmp_path)
    plain = llava().to(torch.bfloat16)
    load_adapters(plain, tmp_path)
    assert {value.dtype for name, value in plain.named_parameters() if ".lora_" in name} == {torch.float32}
    assert torch.equal(logits(plain), logits(model))


def test_a_folder_in_pefts_own_layout_loads_under_its_name(tmp_path: Path) -> None:
    model, _ = trained(llava())
    (vision, _) = save_adapters(model, tmp_path)
    plain = llava()
    assert load_adapters(plain, vision.rename(tmp_path / "step-1.5")) == ("step-1-5",)
    assert adapter_names(plain) == ("step-1-5",)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model, _ = trained(llava(), connector="full")
    save_adapters(model, tmp_path / "a")
    save_adapters(model, tmp_path / "b", state=model.state_dict())
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 5
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_a_tied_embedding_that_is_trained_whole_is_saved_once_and_loads(tmp_path: Path) -> None:
    model = llava(tied=True)
    rules = [
        FullRule(match="language.embeddings", method="full"),
        LoraRule(match="language", method="lora", rank=2),
        FrozenRule(match="*", method="frozen"),
    ]
    apply_tuning(model, find_components(model), rules, 1e-3)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    save_adapters(model, tmp_path)
    assert set(load_file(tmp_path / "trainable.safetensors")) == {"model.language_model.embed_tokens.weight"}
    plain = llava(tied=True)
    load_adapters(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def test_a_bias_trained_inside_an_adapted_layer_keeps_its_plain_name(tmp_path: Path) -> None:
    model = tiny_family("qwen2_5_vl")[0]
    rules = [
        FullRule(match="model.language_model.layers.0.self_attn.q_proj.bias", method="full"),
        LoraRule(match="language", method="lora", rank=2),
        FrozenRule(match="*", method="frozen"),
    ]
    apply_tuning(model, find_components(model), rules, 1e-3)
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj.base_layer.bias.add_(1.0)
    save_adapters(model, tmp_path)
    assert set(load_file(tmp_path / "trainable.safetensors")) == {"model.language_model.layers.0.self_attn.q_proj.bias"}
    plain = tiny_family("qwen2_5_vl")[0]
    load_adapters(plain, tmp_path)
    assert torch.equal(text_logits(plain), text_logits(model))


def test_disagreements_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter in"):
        load_adapters(llava(), tmp_path)
    model, _ = trained(llava(), connector="full")
    save_adapters(model, tmp_path)
    config = tmp_path / TWO[0] / "adapter_config.json"
    changed = json.loads(config.read_text()) | {"lora_alpha": 64}
    config.write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="adapter has lora_alpha 4, the stored one 64"):
        load_adapters(trained(llava())[0], tmp_path)
    config.write_text(json.dumps(changed | {"lora_alpha": 4}))
    weights = load_file(tmp_path / "trainable.safetensors")
    weights["model.multi_modal_projector.linear_1.bias"] = torch.zeros(7)
    weights["model.other.bias"] = torch.zeros(1)
    save_file(weights, tmp_path / "trainable.safetensors")
    with pytest.raises(ModelError) as caught:
        load_adapters(llava(), tmp_path)
    assert "`model.multi_modal_projector.linear_1.bias` is (7,) in the file, (32,) in the model" in str(caught.value)
    assert "`model.other.bias` is in the file, not in the model" in str(caught.value)
    adapter = tmp_path / TWO[0] / "adapter_model.safetensors"
    partial = load_file(adapter)
    partial.pop(next(iter(partial)))
    save_file(partial, adapter)
    with pytest.raises(ModelError, match="is in the model, not in the file"):
        load_adapters(llava(), tmp_path)


# --- merging -----------------------------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_does_not_merge() -> None:
    model, _ = trained(llava())
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj.lora_B[TWO[1]].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"cannot merge `model.language_model.layers.0.self_attn.q_proj`"):
        merge_adapters(model)


# --- switching off -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_without_adapters_the_model_is_its_base_and_flags_survive(tied: bool) -> None:
    base, (model, _) = llava(tied), trained(llava(tied), tokens=(5, 8))
    first = next(parameter for name, parameter in model.named_parameters() if ".lora_A." in name)
    first.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    on = logits(model)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(base))
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        with adapters_disabled(model):
            pass
        assert torch.equal(logits(model), logits(base))  # leaving an inner block does not switch them on
    assert torch.equal(logits(model), on)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_adapters_come_back_after_an_error() -> None:
    model, _ = trained(llava())
    on = logits(model)
    with pytest.raises(RuntimeError), adapters_disabled(model):
        raise RuntimeError("out of memory")
    assert torch.equal(logits(model), on)


def test_a_copy_keeps_its_adapters() -> None:
    model, _ = trained(llava(), tokens=(5,))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
