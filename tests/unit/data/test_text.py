"""Text to ids and spans."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from tests.real_tokenizers import REAL_TOKENIZERS, smollm2, with_tokens
from triptych.core.errors import ModelError
from triptych.data.text import TextEncoder


@functools.cache
def text_encoder(name: str) -> TextEncoder:
    return TextEncoder(with_tokens(name))


TEXTS = ["Hello world", " two  spaces", "a\n\nb", "描述这张图片", "👍🏽!", "e\u0301", "12345", "f(x) -> y"]


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_ids_are_those_of_the_tokenizer_and_spans_leave_no_gap(name: str) -> None:
    tokenizer = with_tokens(name)
    encoder = text_encoder(name)
    for text in TEXTS:
        tokens = encoder.encode(text, continues=False)
        assert [token for token, _, _ in tokens] == tokenizer(text, add_special_tokens=False)["input_ids"]
        covered = {place for _, start, stop in tokens for place in range(start, stop)}
        # Qwen composes a letter and a combining accent: the accent's own place is dropped at the end of a text.
        assert covered == set(range(max(covered) + 1))


@pytest.mark.requirement("A-29")
def test_a_continuation_gets_no_beginning_of_text_space() -> None:
    tokenizer = with_tokens("mistral")
    encoder = text_encoder("mistral")
    alone = [token for token, _, _ in encoder.encode("see", continues=False)]
    continued = encoder.encode("see", continues=True)
    assert tokenizer.convert_ids_to_tokens(alone) == ["▁see"]
    assert tokenizer.convert_ids_to_tokens([token for token, _, _ in continued]) == ["see"]
    assert continued[0][1:] == (0, 3)


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_a_continuation_decodes_to_its_text(name: str) -> None:
    tokenizer = with_tokens(name)
    encoder = text_encoder(name)
    head = tokenizer("Say:", add_special_tokens=False)["input_ids"]
    for text in ["see", " see", "\nsee", "\n\n", "7", "(x", "的"]:
        ids = [token for token, _, _ in encoder.encode(text, continues=True)]
        assert tokenizer.decode(head + ids) == "Say:" + text


@pytest.mark.requirement("A-19", "A-30")
@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_control_tokens_can_be_spelled_in_letters(name: str) -> None:
    tokenizer = with_tokens(name)
    encoder = text_encoder(name)
    for control in ("<image>", "<|im_end|>", tokenizer.eos_token):
        ids = encoder.spell(control)
        assert encoder.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == control


def test_content_tokens_are_not_control_tokens() -> None:
    tokenizer = with_tokens("mistral")
    number = tokenizer.convert_tokens_to_ids("<image>")
    assert number in text_encoder("mistral").control_ids
    assert number not in TextEncoder(tokenizer, ["<image>"]).control_ids


@pytest.mark.requirement("A-27")
def test_a_placeholder_must_be_a_token() -> None:
    text_encoder("smollm2").require_tokens("<image>")
    with pytest.raises(ModelError, match=r"`<image>` of a picture is not a token of the tokenizer: it becomes \[\d+, "):
        TextEncoder(smollm2()).require_tokens("<image>")


def test_it_does_not_share_state_with_the_tokenizer() -> None:
    tokenizer = with_tokens("qwen")
    encoder = text_encoder("qwen")
    tokenizer(["a", "b c d"], padding="max_length", max_length=9, truncation=True)
    assert len(encoder.encode("one two three four five six seven eight nine ten", continues=False)) == 10


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot say which characters"):
        TextEncoder(SimpleNamespace(is_fast=False))
