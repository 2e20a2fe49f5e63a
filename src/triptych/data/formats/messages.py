"""Chat messages: OpenAI, TRL, LLaMA-Factory and ms-swift rows, with pictures beside or inside the messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from triptych.core.errors import DataError, Problem
from triptych.core.types import Sample
from triptych.data.formats.base import DatasetBase, RowContext
from triptych.data.formats.parts import row_pictures
from triptych.data.formats.turns import (
    Turn,
    check_conversation,
    read_turns,
    refuse_comparisons,
    refuse_unsupported,
    system_turn,
    text_turn,
    to_messages,
)
from triptych.data.sources import Row

_LISTS = ("messages", "conversations", "conversation")


class MessagesConfig(DatasetBase):
    """Rows of `messages` (or `conversations`, or `query`/`response`/`history`) with `images` or picture parts."""

    format: Literal["messages"]
    """Selects this format."""


def read_messages_row(row: Row, config: MessagesConfig, context: RowContext) -> Sequence[Sample]:
    """Read one row.

    Raises:
        DataError: no messages, wrong roles or order, empty turns, placeholders that do not match the pictures.
    """
    refuse_unsupported(row)
    refuse_comparisons(row)
    messages = to_messages(conversation_turns(row, context), row_pictures(row, context))
    check_conversation(messages)
    return [Sample(messages, context.origin, task=context.task)]


def conversation_turns(row: Row, context: RowContext) -> list[Turn]:
    """The turns of a row, a row-level `system` first.

    Raises:
        DataError: the row has none of the known fields, or a turn cannot be read.
    """
    key = next((name for name in _LISTS if row.get(name)), None)
    turns = system_turn(row, context)
    if key is not None:
        return turns + _read_list(row[key], context, key)
    if row.get("query") is not None:
        return turns + _read_query(row, context)
    shown = ", ".join(f"`{name}`" for name in list(row)[:8])
    message = f"the row has no `messages`; it has {shown or 'no keys'}"
    raise DataError(Problem(message, key="messages", remedy='add "messages": [{"role", "content"}, ...]'))


def _read_list(entries: Any, context: RowContext, key: str) -> list[Turn]:
    is_paired = key == "conversation" and isinstance(entries, list) and all(_is_round(entry) for entry in entries)
    if not is_paired:
        return read_turns(entries, context, key=key)
    turns = []
    for entry in entries:
        turns.append(text_turn("user", entry["human"], context, key="human"))
        turns.append(text_turn("assistant", entry["assistant"], context, key="assistant"))
    return turns


def _is_round(entry: Any) -> bool:
    return isinstance(entry, dict) and "human" in entry and "assistant" in entry


def _read_query(row: Row, context: RowContext) -> list[Turn]:
    turns = []
    history = row.get("history") or []
    for past in history if isinstance(history, list) else [history]:
        if not isinstance(past, list) or len(past) != 2:
            message = "`history` is not a list of [query, response] pairs"
            raise DataError(Problem(message, key="history", remedy='write "history": [["question", "answer"], ...]'))
        turns.append(text_turn("user", past[0], context, key="history"))
        turns.append(text_turn("assistant", past[1], context, key="history"))
    turns.append(text_turn("user", row["query"], context, key="query"))
    turns.append(text_turn("assistant", row.get("response"), context, key="response"))
    return turns
