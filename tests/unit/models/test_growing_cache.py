"""The growing cache holds what transformers' own would hold."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from tests.tiny import FAMILIES, tiny_family
from triptych.models.growing_cache import GrowingLayer, growing_cache


def states(tokens: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 4, generator=generator), torch.randn(batch, 3, tokens, 4, generator=generator)


def test_it_holds_the_same_as_tokens_come() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for number, tokens in enumerate([5, 1, 1, 70, 1, 200, 1]):
        new = states(tokens, number)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_nothing_is_copied_while_there_is_room() -> None:
    layer = GrowingLayer()
    first = layer.update(*states(10, 0))[0]
    for number in range(50):
        assert layer.update(*states(1, number))[0].data_ptr() == first.data_ptr()
    assert layer.update(*states(100, 9))[0].data_ptr() != first.data_ptr()


@pytest.mark.parametrize("change", ["repeat", "select", "crop", "reorder"])
def test_what_others_do_to_a_layer_holds(change: str) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(6, 0))
        layer.update(*states(1, 1))
        if change == "repeat":
            layer.batch_repeat_interleave(2)
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1, 1, 0, 1]))
        elif change == "crop":
            layer.crop(-3)
            layer.batch_repeat_interleave(2)
        else:
            layer.reorder_cache(torch.tensor([1, 0]))
    batch = 2 if change == "reorder" else 4
    for number in range(3):
        new = states(1, number + 2, batch)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_not_plain_stay_as_they_are(family: str) -> None:
    model, _, _ = tiny_family(family)
    layers = growing_cache(model).layers
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    assert all(type(layer) is GrowingLayer or layer.is_sliding for layer in layers)
    assert any(layer.is_sliding for layer in layers) == (family == "gemma3")
