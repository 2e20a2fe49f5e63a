"""Features of pictures whose tower states are known equal those of their pixels, gradients included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import FAMILIES, Answer, Row, batch_of, noise, tiny_family
from triptych.core.errors import ModelError
from triptych.core.types import Batch, PictureInput
from triptych.models.components import component_parameters, find_components
from triptych.models.features import FeatureCache
from triptych.models.pictures import make_pictures
from triptych.models.vision import store_obstacle, tower_state
from triptych.models.vlm import VlmScorer

EVERY = (*FAMILIES, "llava_clip")
A, B, C = noise(40, 60, seed=1), noise(64, 32, seed=2), noise(32, 32, seed=3)
ROWS: tuple[Row, ...] = (
    (A, "what?", Answer("a cat<|im_end|>")),
    ("hello", Answer("good day to you")),
    ("one", A, "two", B, "three", C, "same?", Answer("no<|im_end|>")),
)


def _build(family: str) -> tuple[VlmScorer, Any, Any]:
    model, tokenizer, processor = tiny_family(family)
    pictures = make_pictures(model.config, processor, tokenizer)
    components = find_components(model)
    frozen = ["vision", "connector"] if family.startswith("qwen") else ["vision"]
    for component in frozen:
        for parameter in component_parameters(components, component, model).values():
            parameter.requires_grad_(False)
    scorer = VlmScorer(model, components, pictures=pictures).train()
    return scorer, tokenizer, pictures


def _inputs(batch: Batch, pictures: Any, store: FeatureCache) -> Batch:
    """The batch as the loader makes it where there is a store."""
    items = []
    for key, picture in zip("ABC", (A, B, C), strict=True):
        known = store.get(key)
        items.append(PictureInput(key, None if known else pictures.pixels([picture]), known))
    return replace(batch, pixels=None, picture_inputs=tuple(items))


def _run(scorer: VlmScorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    scorer.zero_grad()
    logprobs = scorer(batch).token_logprobs
    assert logprobs is not None
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in scorer.hf.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", EVERY)
def test_known_states_give_the_same_loss_and_gradients_without_the_tower(family: str, tmp_path: Path) -> None:
    scorer, tokenizer, pictures = _build(family)
    assert store_obstacle(scorer.hf, scorer.components) is None
    batch = batch_of(ROWS, tokenizer, pictures)
    expected, gradients = _run(scorer, batch)
    store = scorer.vision.store = FeatureCache(tmp_path)
    calls = []
    path = scorer.components.layers["vision"][0]
    scorer.hf.get_submodule(path).register_forward_pre_hook(lambda module, inputs: calls.append(1))
    filled, ours = _run(scorer, _inputs(batch, pictures, store))
    assert len(calls) == 3 and len(store) == 3
    torch.testing.assert_close(filled, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    store.flush()
    store = scorer.vision.store = FeatureCache(tmp_path)
    read, again = _run(scorer, _inputs(batch, pictures, store))
    assert len(calls) == 3  # the tower rests
    assert torch.equal(read, filled) and all(torch.equal(again[name], value) for name, value in ours.items())


def test_some_known_and_some_new_pictures_are_the_same_to_the_bit(tmp_path: Path) -> None:
    scorer, tokenizer, pictures = _build("llava")
    batch = batch_of(ROWS, tokenizer, pictures)
    full = FeatureCache(tmp_path / "full")
    scorer.vision.store = full
    expected, gradients = _run(scorer, _inputs(batch, pictures, full))
    partly = FeatureCache(tmp_path / "partly")
    known = full.get("B")
    assert known is not None
    partly.put("B", known)
    scorer.vision.store = partly
    found, ours = _run(scorer, _inputs(batch, pictures, partly))
    assert torch.equal(found, expected) and all(torch.equal(ours[name], value) for name, value in gradients.items())


def test_states_are_those_of_the_frozen_tower_alone(tmp_path: Path) -> None:
    scorer, _, pictures = _build("llava")
    item = PictureInput("A", pictures.pixels([A]))
    before: Mapping[str, Tensor] = scorer.vision.states(item)
    for parameter in component_parameters(scorer.components, "connector", scorer.hf).values():
        parameter.data.add_(1.0)
    after = scorer.vision.states(item)
    assert before.keys() == {"states"} and torch.equal(before["states"], after["states"])
    names = tower_state(scorer.hf, scorer.components)
    assert names and all("vision_tower" in name for name in names)
    qwen, _, _ = _build("qwen2_5_vl")
    assert any("merger" in name for name in tower_state(qwen.hf, qwen.components))


def test_what_trains_is_not_kept() -> None:
    for family, component, reason in (
        ("llava", "vision", "the vision tower trains"),
        ("qwen3_vl", "connector", "the connector is a part of the vision tower, and trains"),
    ):
        scorer, _, _ = _build(family)
        for parameter in component_parameters(scorer.components, component, scorer.hf).values():
            parameter.requires_grad_(True)
        assert store_obstacle(scorer.hf, scorer.components) == reason


def test_a_batch_whose_pictures_are_not_attached_is_refused() -> None:
    scorer, tokenizer, pictures = _build("llava")
    batch = batch_of(ROWS, tokenizer, pictures)
    with pytest.raises(ModelError, match="a batch of 3 pictures has no pixels"):
        scorer(replace(batch, pixels=None))
    inputs = (PictureInput("A", pictures.pixels([A])),)
    with pytest.raises(ModelError, match="features of 1 pictures, the batch has 3"):
        scorer(replace(batch, pixels=None, picture_inputs=inputs))


def test_the_connector_gets_its_gradients_under_autocast_too(tmp_path: Path) -> None:
    scorer, tokenizer, pictures = _build("llava")
    batch = batch_of(ROWS, tokenizer, pictures)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = _run(scorer, batch)
    scorer.vision.store = FeatureCache(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = _run(scorer, _inputs(batch, pictures, scorer.vision.store))
    names = [name for name in expected if "multi_modal_projector" in name]
    assert names and ours.keys() == expected.keys()
    for name in names:
        assert (ours[name] - expected[name]).norm() <= 0.05 * expected[name].norm(), name
