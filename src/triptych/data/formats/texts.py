"""Rows of the_cauldron and FineVision: pictures as bytes, and `texts` of user and assistant strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from triptych.core.errors import DataError, Problem
from triptych.core.types import Sample
from triptych.data.formats.base import DatasetBase, RowContext
from triptych.data.formats.parts import row_pictures
from triptych.data.formats.turns import check_conversation, refuse_unsupported, text_turn, to_messages
from triptych.data.sources import Row


class TextsConfig(DatasetBase):
    """Rows of `{"images": [bytes or path], "texts": [{"user", "assistant"}]}`, from Parquet or a saved data set.

    The pictures stand before the first question: these data sets have no placeholders.
    """

    format: Literal["texts"]
    """Selects this format."""


def read_texts_row(row: Row, config: TextsConfig, context: RowContext) -> Sequence[Sample]:
    """Read one row.

    Raises:
        DataError: no texts, a missing or empty question or answer, a picture that is neither bytes nor a path.
    """
    refuse_unsupported(row)
    rounds = row.get("texts")
    if not isinstance(rounds, list) or not rounds or not all(isinstance(item, dict) for item in rounds):
        message = "`texts` is not a list of questions and answers"
        raise DataError(Problem(message, key="texts", remedy='write "texts": [{"user", "assistant"}, ...]'))
    turns = []
    for item in rounds:
        turns.append(text_turn("user", item.get("user"), context, key="user"))
        turns.append(text_turn("assistant", item.get("assistant"), context, key="assistant"))
    messages = to_messages(turns, row_pictures(row, context), prepend=True)
    check_conversation(messages)
    return [Sample(messages, context.origin, task=context.task)]
