"""Tokens that a recipe adds are trained, or the recipe is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from tests.tiny import VOCABULARY, noise, tiny_family
from triptych.core.errors import ModelError
from triptych.models.components import find_components
from triptych.models.load import LoadedVlm
from triptych.models.new_tokens import cover_new_tokens, untrained_tokens
from triptych.models.pictures import make_pictures
from triptych.models.tokens import TokenRegistry
from triptych.models.tuning import apply_tuning
from triptych.models.tuning_rules import FrozenRule, FullRule, LoraRule, TuningRule

IDS = (380, 381)
FROZEN = FrozenRule(match="*", method="frozen")


def cover(model: PreTrainedModel, *rules: TuningRule, ids: tuple[int, ...] = IDS) -> tuple[TuningRule, ...]:
    return cover_new_tokens(model, find_components(model), rules, ids)


def tokens(rules: tuple[TuningRule, ...]) -> list[tuple[int, ...]]:
    return [rule.train_tokens if isinstance(rule, LoraRule) else () for rule in rules]


def lora(match: str, train_tokens: tuple[int, ...] = ()) -> LoraRule:
    return LoraRule(match=match, method="lora", rank=2, train_tokens=train_tokens)


@pytest.mark.requirement("A-44")
def test_the_ids_go_to_the_lora_rule_that_fits_best() -> None:
    model, _, _ = tiny_family("llava")
    first, last = lora("language.layers[0:1]"), lora("language.layers[1:2]")
    assert tokens(cover(model, lora("vision"), first, lora("language"), FROZEN)) == [(), (), IDS, ()]
    assert tokens(cover(model, lora("vision"), first, last, FROZEN)) == [(), IDS, (), ()]
    assert tokens(cover(model, first, lora("language.layers", (7,)), FROZEN)) == [(), (7, *IDS), ()]
    assert cover(model, FROZEN, ids=()) == (FROZEN,)


@pytest.mark.requirement("A-44")
def test_covered_rows_are_trained_in_embedding_and_head() -> None:
    model, _, _ = tiny_family("llava")
    rules = cover(model, lora("language.layers"), FROZEN)
    plan = apply_tuning(model, find_components(model), rules, 1e-3)
    trained = {name: tuple(item.shape) for group in plan.groups for name, item in group.parameters.items()}
    deltas = [shape for name, shape in trained.items() if "trainable_tokens_delta" in name]
    assert deltas == [(2, 32), (2, 32)]


def test_nothing_is_missing_where_the_embedding_is_trained_whole() -> None:
    model, _, _ = tiny_family("llava")
    rules = (FullRule(match="language", method="full"), FROZEN)
    assert cover(model, *rules) == rules
    with pytest.raises(ModelError, match=r"not in the output head(?s:.*)language.head, method: full"):
        cover(model, FullRule(match="language.embeddings", method="full"), FROZEN)


@pytest.mark.requirement("A-44")
def test_a_frozen_language_model_is_refused_with_the_remedy() -> None:
    model, _, _ = tiny_family("llava")
    for rules in ((FROZEN,), (lora("vision"), FROZEN)):
        with pytest.raises(ModelError, match=r"2 tokens were added \(ids 380 to 381\)(?s:.*)with `lora` or `full`"):
            cover(model, *rules)


def test_the_picture_token_and_padding_need_no_training() -> None:
    model, tokenizer, processor = tiny_family("llava")
    pictures = make_pictures(model.config, processor, tokenizer)
    image, pad = model.config.image_token_id, tokenizer.pad_token_id
    registry = TokenRegistry(new_ids=(image, pad, 380))
    loaded = LoadedVlm(model, tokenizer, processor, pictures, find_components(model), None, registry, None)
    assert len(pictures.token_ids(*noise().size)) == 16 and VOCABULARY > 380
    assert untrained_tokens(loaded) == (380,)
    tokenizer.pad_token = tokenizer.eos_token  # the end of an answer is learned
    ends = TokenRegistry(new_ids=(image, tokenizer.eos_token_id))
    assert untrained_tokens(replace(loaded, tokens=ends)) == (tokenizer.eos_token_id,)
