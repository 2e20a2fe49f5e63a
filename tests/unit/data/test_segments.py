"""The small parts that templates are made of."""

from __future__ import annotations

import pytest

from tests.conversations import PICTURE, say
from tests.real_tokenizers import mistral, smollm2
from triptych.core.errors import ModelError
from triptych.core.types import Message, Text, TokenKind
from triptych.data.segments import Segment, added_bos, fixed, learn, message_segments, require_token


def test_parts_keep_their_order_and_their_own_kind() -> None:
    message = Message("assistant", (Text("at "), Text("[1, 2]", TokenKind.BOX), PICTURE, Text("")))
    assert message_segments(message, TokenKind.RESPONSE, "<image>") == [
        Segment("at ", TokenKind.RESPONSE, is_content=True),
        Segment("[1, 2]", TokenKind.BOX, is_content=True),
        Segment("<image>", TokenKind.IMAGE, image=PICTURE),
    ]


def test_an_answer_starts_at_its_first_text_and_never_learns_a_picture() -> None:
    answer = [fixed(""), *message_segments(say("assistant", "x", PICTURE), TokenKind.RESPONSE, "<image>")]
    learned = learn(answer, is_supervised=True, weight=0.5)
    assert [segment.starts_answer for segment in learned] == [True, False]
    assert [segment.supervised for segment in learned] == [True, False]
    assert [segment.weight for segment in learned] == [0.5, 0.5]


@pytest.mark.requirement("A-16", "A-29")
def test_control_tokens_must_be_tokens() -> None:
    tokenizer = mistral()
    assert require_token(tokenizer, "</s>", "vicuna_v1") == "</s>"
    with pytest.raises(ModelError, match="would spell it in letters"):
        require_token(tokenizer, "<|im_end|>", "chatml")
    with pytest.raises(ModelError, match="eos_token"):
        require_token(tokenizer, None, "vicuna_v1")


@pytest.mark.requirement("A-29")
def test_bos_is_written_where_the_tokenizer_itself_would() -> None:
    assert added_bos(mistral()) == "<s>"
    assert added_bos(smollm2()) == ""
