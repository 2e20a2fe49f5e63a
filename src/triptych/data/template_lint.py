"""Checks a template by its effect: render a conversation, tokenise it, and recover from the tokens who said what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triptych.core.errors import Problem
from triptych.core.types import IGNORE, ImageReference, Message, Text, TokenKind
from triptych.data.segments import Segment
from triptych.data.tokenize import ConversationEncoder, Row

_SIZE = (224, 224)
_REMEDY = "choose a built-in template, or mend the model's chat template"


def lint_template(encoder: ConversationEncoder, tokenizer: Any, has_pictures: bool = True) -> list[Problem]:
    """Check three principles on a conversation of two rounds.

    1. The place of a picture is explicit: its tokens stand once, between the words around it.
    2. Roles can be told apart: what stands before the words of a user and of an assistant differs.
    3. Boundaries are consistent: each answer recovered from the labels is the answer given and the same closing token.

    Args:
        encoder: with the template to check.
        tokenizer: the encoder's tokenizer, to turn ids back into text.
        has_pictures: False for a model of text alone.

    Returns:
        One problem for each principle that is broken; none for a sound template.
    """
    answers = ("It is a red kite.", "Two of them.")
    picture: tuple[ImageReference, ...] = (ImageReference(path="lint.png"),) if has_pictures else ()
    messages = (
        Message("user", (Text("Look here "), *picture, Text(" and say what it is."))),
        Message("assistant", (Text(answers[0]),)),
        Message("user", (Text("How many are there?"),)),
        Message("assistant", (Text(answers[1]),)),
    )
    segments = encoder.template.segments(messages)
    row = encoder.encode_segments(segments, lambda _: _SIZE)
    problems = []
    if has_pictures and not _picture_is_between(row, tokenizer):
        problems.append(_problem(encoder, 1, "the tokens of a picture do not stand where the message puts it"))
    if _marker_before(segments, "How many are there?") in ("", _marker_before(segments, answers[1])):
        problems.append(_problem(encoder, 2, "nothing tells the words of the user from those of the assistant"))
    problems += _check_boundaries(encoder, row, answers, tokenizer)
    return problems


def _picture_is_between(row: Row, tokenizer: Any) -> bool:
    if len(row.spans) != 1:
        return False
    start, stop = row.spans[0]
    return tokenizer.decode(row.ids[:start]).rstrip().endswith("Look here") and tokenizer.decode(
        row.ids[stop:]
    ).lstrip().startswith("and say")


def _marker_before(segments: Sequence[Segment], words: str) -> str:
    """The template's own text right before some words, back to the end of the last answer or message."""
    index = next(number for number, segment in enumerate(segments) if segment.text == words)
    marker = ""
    for segment in reversed(segments[:index]):
        if segment.kind != TokenKind.SPECIAL and segment.text.strip():
            break
        marker = segment.text + marker
    return marker.strip()


def _check_boundaries(encoder: ConversationEncoder, row: Row, answers: Sequence[str], tokenizer: Any) -> list[Problem]:
    spans: list[list[int]] = []
    for position, label in enumerate(row.labels):
        if label != IGNORE:
            if position == 0 or row.labels[position - 1] == IGNORE:
                spans.append([])
            spans[-1].append(position)
    if len(spans) != len(answers):
        return [_problem(encoder, 3, f"{len(spans)} stretches of tokens are learned for {len(answers)} answers")]
    ends = []
    for span, answer in zip(spans, answers, strict=True):
        words = [row.ids[position] for position in span if row.kinds[position] != TokenKind.END_OF_TURN]
        ends.append(tuple(row.ids[position] for position in span if row.kinds[position] == TokenKind.END_OF_TURN))
        if tokenizer.decode(words).strip() != answer:
            return [_problem(encoder, 3, f"`{answer}` is learned as `{tokenizer.decode(words)}`")]
    if not ends[0] or len(set(ends)) > 1:
        shown = ", ".join(repr(tokenizer.decode(list(end))) for end in ends)
        return [_problem(encoder, 3, f"answers do not close with the same token: {shown}")]
    return []


def _problem(encoder: ConversationEncoder, principle: int, message: str) -> Problem:
    return Problem(f"template `{encoder.template.name}`, principle {principle}: {message}", remedy=_REMEDY)
