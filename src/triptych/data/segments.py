"""Conversations as segments: what is written, by whom, and whether it is learned.

A template never returns a string. It returns segments in order, so that labels come from what wrote a character and
not from searching the result. Three kinds of text are kept apart: what the template writes (control tokens count), what
a message says (control tokens in it are plain text), and pictures (a placeholder, expanded later at id level).

    <|im_start|>user\\n [picture] Who is it? <|im_end|>\\n<|im_start|>assistant\\n | A dog. <|im_end|> \\n
    template            picture   message    template                              ^ answer  end      template
                                                                                   generation starts here

The end of an answer is learned, so that the model stops; role markers and separators are not: inference supplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from triptych.core.errors import ModelError
from triptych.core.types import ImageReference, Message, Text, TokenKind


@dataclass(frozen=True)
class Segment:
    """A run of characters of one origin."""

    text: str
    """What is written; for a picture, the placeholder of the model."""
    kind: TokenKind
    supervised: bool = False
    """Whether the model learns to write it."""
    weight: float = 1.0
    """Loss weight of the message it belongs to."""
    image: ImageReference | None = None
    """The picture that stands here, else None."""
    is_content: bool = False
    """True for the words of a message: control tokens spelled out in them stay plain text."""
    starts_answer: bool = False
    """True for the first segment behind a generation prompt: inference has encoded all before it on its own."""


class Template(Protocol):
    """Renders messages to segments."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, supervise_from: int = 0
    ) -> list[Segment]:
        """Render a conversation.

        Args:
            messages: the turns in order.
            add_generation_prompt: end with what inference writes before the model answers.
            supervise_from: index of the first message whose answer is learned (the prompt of a preference is not).

        Raises:
            DataError: the turns are in an order this template cannot express.
            ModelError: the template cannot be split into segments.
        """
        ...


def fixed(text: str) -> Segment:
    """Text the template writes."""
    return Segment(text, TokenKind.SPECIAL)


def message_segments(message: Message, kind: TokenKind, placeholder: str) -> list[Segment]:
    """The parts of a message in order, empty ones left out; a part's own kind goes before `kind`."""
    return [part_segment(part, kind, placeholder) for part in message.parts if part != Text("")]


def part_segment(part: Text | ImageReference, kind: TokenKind, placeholder: str) -> Segment:
    """One part of a message."""
    if isinstance(part, ImageReference):
        return Segment(placeholder, TokenKind.IMAGE, image=part)
    return Segment(part.text, kind if part.kind is None else part.kind, is_content=True)


def learn(answer: Sequence[Segment], is_supervised: bool, weight: float) -> list[Segment]:
    """Mark the segments of one answer: supervised (never its pictures), weighted, and where it starts."""
    written = [segment for segment in answer if segment.text]
    return [
        replace(
            segment,
            supervised=is_supervised and segment.image is None,
            weight=weight,
            starts_answer=index == 0,
        )
        for index, segment in enumerate(written)
    ]


def require_token(tokenizer: Any, token: str | None, template: str) -> str:
    """Return `token` if it is one token of this tokenizer.

    Raises:
        ModelError: it is not, so that it would be written as ordinary letters.
    """
    if token is None:
        raise ModelError(
            f"template `{template}` closes answers with the end-of-sequence token, but the tokenizer names none",
            remedy="set the tokenizer's `eos_token`",
        )
    if all(added.content != token for added in tokenizer.added_tokens_decoder.values()):
        raise ModelError(
            f"template `{template}` needs `{token}` as one token, but the tokenizer would spell it in letters",
            remedy=f"add `{token}` as a special token, or choose a template this tokenizer was made for",
        )
    return token


def added_bos(tokenizer: Any) -> str:
    """The beginning-of-sequence token if the tokenizer puts it before a text of its own accord, else nothing."""
    if tokenizer.bos_token is None:
        return ""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    full = tokenizer("x")["input_ids"]
    has_bos = len(full) > len(bare) and full[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if has_bos else ""


def first_token(tokenizer: Any) -> str:
    """The beginning-of-sequence token if the vocabulary has one, for templates that would begin with a picture.

    A language model uses the first token of a row as a place to attend to when there is nothing to say (the attention
    sink of Xiao et al. 2023, arXiv 2309.17453): a picture token there would be lost.
    """
    return str(tokenizer.bos_token or "")
