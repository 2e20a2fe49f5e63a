"""LLaVA conversations: `image` or `images`, and `conversations` of `from` and `value`.

Layout: https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md, also used by Qwen3-VL, InternVL
and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from triptych.core.errors import DataError, Problem
from triptych.core.types import Sample
from triptych.data.formats.base import DatasetBase, RowContext
from triptych.data.formats.parts import row_pictures
from triptych.data.formats.turns import (
    check_conversation,
    read_turns,
    refuse_comparisons,
    refuse_unsupported,
    system_turn,
    to_messages,
)
from triptych.data.sources import Row


class LlavaConfig(DatasetBase):
    """Rows of `{"id", "image" | "images", "conversations": [{"from", "value"}]}`; without pictures, text only."""

    format: Literal["llava"]
    """Selects this format."""


def read_llava_row(row: Row, config: LlavaConfig, context: RowContext) -> Sequence[Sample]:
    """Read one row.

    Raises:
        DataError: no conversation, wrong roles or order, empty turns, placeholders that do not match the pictures.
    """
    refuse_unsupported(row)
    refuse_comparisons(row)
    if row.get("conversations") is None:
        remedy = "use `format: messages`" if row.get("messages") else 'add "conversations": [{"from", "value"}, ...]'
        raise DataError(Problem("the row has no `conversations`", key="conversations", remedy=remedy))
    turns = system_turn(row, context)
    turns += read_turns(row["conversations"], context, key="conversations")
    messages = to_messages(turns, row_pictures(row, context))
    check_conversation(messages)
    return [Sample(messages, context.origin, task=context.task)]
