"""The model's own Jinja template, split without searching tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conversations import OTHER, PICTURE, say
from tests.real_tokenizers import mistral, smollm2, with_template
from tests.unit.data.test_templates import ROUNDS, learned, text_of
from triptych.core.errors import DataError, ModelError
from triptych.core.types import TokenKind
from triptych.data.chat_template import ChatTemplate

PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PICTURES_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def template(tokenizer: Any, jinja: str) -> ChatTemplate:
    return ChatTemplate(with_template(tokenizer, jinja), "<image>")


@pytest.mark.requirement("A-19", "C-7")
def test_smollm2_own_template_is_split_like_chatml() -> None:
    tokenizer = smollm2()
    segments = ChatTemplate(tokenizer, "<image>").segments(ROUNDS)
    turns = [
        {"role": "user", "content": "<image>\nWho is it?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It barks."},
    ]
    assert text_of(segments) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert learned(segments) == ["A dog.<|im_end|>", "It barks.<|im_end|>"]
    assert [segment.image for segment in segments if segment.image] == [PICTURE]
    assert segments[-1].text == "\n"
    prompt = ChatTemplate(tokenizer, "<image>").segments(ROUNDS[:1], add_generation_prompt=True)
    assert text_of(prompt) == tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)


def test_a_template_that_walks_parts_gets_parts() -> None:
    segments = template(smollm2(), PARTS).segments((say("user", "a ", PICTURE, " b", OTHER), say("assistant", "c")))
    assert text_of(segments) == ("<|im_start|>user\na <image> b<image><|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n")
    assert learned(segments) == ["c<|im_end|>"]


def test_pictures_may_move_and_a_missing_end_is_closed_with_eos() -> None:
    segments = template(smollm2(), PICTURES_FIRST).segments(
        (say("user", "Who?", PICTURE), say("assistant", "Me."), say("user", "And?"), say("assistant", "You."))
    )
    assert text_of(segments) == "USER: <image>\nWho? ASSISTANT: Me. USER: And? ASSISTANT: You.<|im_end|>"
    assert learned(segments) == [" Me.", " You.<|im_end|>"]
    assert segments[-1].kind == TokenKind.END_OF_TURN


def test_a_template_that_trims_is_given_trimmed_words() -> None:
    segments = template(mistral(), TRIMMING).segments((say("user", " Who? \n"), say("assistant", "\nMe.")))
    assert text_of(segments) == "<s>[INST] Who? [/INST] Me. </s>"
    assert learned(segments) == [" Me. </s>"]


@pytest.mark.requirement("A-19", "A-30")
def test_words_that_look_like_control_tokens_or_pictures_are_content() -> None:
    segments = template(smollm2(), PARTS).segments((say("user", "<image> <|im_end|>", PICTURE), say("assistant", "x")))
    assert [segment.text for segment in segments if segment.is_content] == ["<image> <|im_end|>", "x"]
    assert [segment.image for segment in segments if segment.image] == [PICTURE]


@pytest.mark.requirement("C-7")
def test_what_the_template_adds_behind_the_generation_prompt_is_learned() -> None:
    thinking = PARTS.replace(
        "{% for part in message['content'] %}",
        "{% if message['role'] == 'assistant' %}<think></think>\n{% endif %}{% for part in message['content'] %}",
    )
    segments = template(smollm2(), thinking).segments((say("user", "Who?"), say("assistant", "Me.")))
    assert learned(segments) == ["<think></think>\nMe.<|im_end|>"]


@pytest.mark.requirement("A-20")
def test_a_template_that_changes_words_is_refused() -> None:
    shouting = PARTS.replace("{{ part['text'] }}", "{{ part['text'].upper() }}")
    with pytest.raises(ModelError, match="changes the words"):
        template(smollm2(), shouting).segments((say("user", "Who?"), say("assistant", "Me.")))


def test_a_template_that_drops_words_is_refused() -> None:
    last_only = PARTS.replace("in messages %}", "in messages[-1:] %}")
    with pytest.raises(ModelError, match="drops or repeats"):
        template(smollm2(), last_only).segments((say("user", "Who?"), say("assistant", "Me.")))


@pytest.mark.requirement("C-7", "A-29")
def test_a_generation_prompt_that_is_no_prefix_is_refused() -> None:
    other = PARTS.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>model\n{% endif %}")
    with pytest.raises(ModelError, match="generation prompt of turn 2 is not a prefix"):
        template(smollm2(), other).segments((say("user", "Who?"), say("assistant", "Me.")))


def test_a_template_that_writes_no_placeholder_is_refused() -> None:
    blind = PARTS.replace("<image>", "")
    with pytest.raises(ModelError, match="0 times for 1 picture"):
        template(smollm2(), blind).segments((say("user", "Who?", PICTURE), say("assistant", "Me.")))


def test_a_conversation_the_template_refuses_is_an_error_of_the_row() -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PARTS
    with pytest.raises(DataError, match="user first"):
        template(smollm2(), strict).segments((say("system", "x"), say("user", "Who?"), say("assistant", "Me.")))


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        ChatTemplate(with_template(mistral(), None), "<image>")
