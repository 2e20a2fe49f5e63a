"""The preview of an example."""

from __future__ import annotations

import functools
import io

import pytest
from rich.console import Console

from tests.conversations import OTHER, PICTURE, conversation, preference, say
from tests.fake_pictures import FakePictures
from tests.real_tokenizers import with_tokens
from triptych.core.types import Example, TokenKind
from triptych.data.show import show_example
from triptych.data.tokenize import ConversationEncoder


def draw(example: Example, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=300, force_terminal=colour, color_system="standard" if colour else None)
    console.print(show_example(example, with_tokens("smollm2")))
    return console.file.getvalue()  # type: ignore[attr-defined]


@functools.cache
def encoder() -> ConversationEncoder:
    tokenizer = with_tokens("smollm2")
    return ConversationEncoder(tokenizer, "vicuna_v1", FakePictures(tokenizer), 1999, lambda _: (336, 336))


SYSTEM = say("system", "Hi.")


@pytest.mark.requirement("A-13", "C-3")
def test_pictures_collapse_and_the_sums_are_named() -> None:
    lines = draw(
        encoder().encode(
            conversation(SYSTEM, say("user", PICTURE, " Who? ", OTHER), say("assistant", "Me.", weight=0.5))
        )
    ).splitlines()
    assert lines[0] == "data.jsonl:7 (row-7)"
    assert "Hi. USER: [picture 0: 576 tokens] Who? [picture 1: 576 tokens] ASSISTANT:" in lines[1]
    assert lines[2] == "answer, 3 tokens:  Me.<|im_end|>"
    assert "image 1152 tokens, weight 0" in lines[3]
    assert "response 2 tokens, weight 1 " in lines[3]
    assert "end of turn 1 tokens, weight 0.5" in lines[3]


def test_learned_tokens_are_reversed() -> None:
    text = draw(encoder().encode(conversation(SYSTEM, say("user", "Who?"), say("assistant", "Me."))), colour=True)
    assert "\x1b[7;32m Me.\x1b[0m" in text
    assert "\x1b[7;31m<|im_end|>\x1b[0m" in text
    assert "\x1b[34mWho?\x1b[0m" in text or "\x1b[34m Who?\x1b[0m" in text


def test_pictures_that_touch_share_a_name() -> None:
    text = draw(encoder().encode(conversation(SYSTEM, say("user", PICTURE, OTHER, "Who?"), say("assistant", "Me."))))
    assert "[pictures 0-1: 1152 tokens]" in text


def test_branches_and_pairs_are_listed() -> None:
    lines = draw(
        encoder().encode(preference((SYSTEM, say("user", PICTURE, "Who?")), "A red dog", "A cat"))
    ).splitlines()
    assert lines[2] == "branch 0, 3 tokens:  red dog<|im_end|>"
    assert lines[3] == "branch 1, 2 tokens:  cat<|im_end|>"
    assert lines[4] == "branch 0 beats branch 1 (weight 1)"


def test_kind_weights_change_what_is_shown() -> None:
    example = encoder().encode(conversation(SYSTEM, say("user", "Who?"), say("assistant", "Me.")))
    console = Console(file=io.StringIO(), width=300)
    console.print(show_example(example, with_tokens("smollm2"), {TokenKind.RESPONSE: 3.0}))
    assert "response 2 tokens, weight 6 " in console.file.getvalue()  # type: ignore[attr-defined]
