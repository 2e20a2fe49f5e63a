"""Preference pairs: one prompt, an answer that was chosen and one that was rejected.

Layouts: TRL (paired, plain and conversational, prompt given or implicit), LLaMA-Factory ranking, ms-swift, 2U1, oumi,
RLHF-V and RLAIF-V. The row's keys tell them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from triptych.core.errors import DataError, Problem
from triptych.core.types import Message, Pair, Preference, Sample, Text
from triptych.data.formats.base import DatasetBase, RowContext
from triptych.data.formats.messages import conversation_turns
from triptych.data.formats.parts import row_pictures
from triptych.data.formats.turns import (
    Turn,
    check_conversation,
    read_turns,
    refuse_unsupported,
    system_turn,
    text_turn,
    to_messages,
)
from triptych.data.sources import Row


class PreferenceConfig(DatasetBase):
    """Rows of a prompt and two answers; the row's keys tell whose layout it is."""

    format: Literal["preference"]
    """Selects this format."""


@dataclass(frozen=True)
class _Comparison:
    prompt: list[Turn]
    chosen: list[Turn]
    rejected: list[list[Turn]]
    has_placeholders: bool = True
    """False for layouts whose prompts have no placeholders: pictures then stand first."""


def read_preference_row(row: Row, config: PreferenceConfig, context: RowContext) -> Sequence[Sample]:
    """Read one row: the prompt becomes the messages, the answers and their pairs the preference.

    Raises:
        DataError: unknown layout, a missing, empty or equal answer, wrong roles or order, placeholders that do not
            match the pictures.
    """
    refuse_unsupported(row)
    if row.get("rejected_images"):
        message = "`rejected_images` gives the two answers different prompts"
        raise DataError(Problem(message, key="rejected_images", remedy="both answers must be about the same pictures"))
    row = _unpack_text(row)
    comparison = _select_layout(row)(row, context)
    prompt = to_messages(comparison.prompt, row_pictures(row, context), prepend=not comparison.has_placeholders)
    check_conversation(prompt, ends_with="user", what="prompt")
    chosen = _finish(comparison.chosen, "chosen")
    rejected = [_finish(turns, "rejected") for turns in comparison.rejected]
    for answer in rejected:
        if _texts(answer) == _texts(chosen):
            message = f"the chosen and the rejected answer are the same: `{_texts(chosen)[0][:60]}`"
            raise DataError(Problem(message, key="rejected", remedy="drop the row: it prefers nothing"))
    pairs = tuple(Pair(0, loser) for loser in range(1, len(rejected) + 1))
    preference = Preference((chosen, *rejected), pairs)
    return [Sample(prompt, context.origin, preference=preference, task=context.task)]


def _select_layout(row: Row) -> Callable[[Row, RowContext], _Comparison]:
    given = {key for key, value in row.items() if value is not None and value != []}
    for keys, layout in _LAYOUTS:
        if given.issuperset(keys):
            return layout
    shown = ", ".join(f"`{key}`" for key in sorted(given)[:8])
    remedy = "known: prompt + chosen + rejected, conversations + chosen + rejected, messages + rejected_response, ..."
    if "label" in given:
        remedy = "a row with one answer and a label is no pair; give chosen and rejected"
    raise DataError(Problem(f"not a preference pair: the row has {shown or 'no keys'}", remedy=remedy))


def _read_prompted(row: Row, context: RowContext) -> _Comparison:
    """`prompt`, `chosen`, `rejected`, each text or turns (TRL, 2U1, oumi)."""
    chosen, rejected = _read_answer(row, "chosen", context), _read_answer(row, "rejected", context)
    prompt = row["prompt"]
    if isinstance(prompt, str):
        turns = [text_turn("user", prompt, context, key="prompt")]
    else:
        turns = read_turns(prompt, context, key="prompt")
    system = system_turn(row, context)
    if chosen[0].role != "assistant":  # whole conversations beside a prompt that repeats their beginning
        split = _split_prompt(chosen, rejected)
        if [_words(turn) for turn in split.prompt if turn.role == "user"][-1:] != [_words(turns[-1])]:
            message = "`prompt` is not what `chosen` and `rejected` begin with"
            raise DataError(Problem(message, key="prompt", remedy="repeat it there, or give answers alone"))
        return replace(split, prompt=system + split.prompt)
    return _Comparison(system + turns, chosen, [rejected], has_placeholders=False)


def _read_question(row: Row, context: RowContext) -> _Comparison:
    """`question`, `chosen`, `rejected` (RLAIF-V, RLHF-V)."""
    prompt = [text_turn("user", row["question"], context, key="question")]
    chosen, rejected = _read_answer(row, "chosen", context), _read_answer(row, "rejected", context)
    return _Comparison(prompt, chosen, [rejected], has_placeholders=False)


def _read_ranking(row: Row, context: RowContext) -> _Comparison:
    """`conversations` or `messages` up to the question, with `chosen` and `rejected` (LLaMA-Factory)."""
    chosen, rejected = _read_answer(row, "chosen", context), _read_answer(row, "rejected", context)
    return _Comparison(conversation_turns(row, context), chosen, [rejected])


def _read_rejected_response(row: Row, context: RowContext) -> _Comparison:
    """A whole conversation whose last turn is the chosen answer, with `rejected_response` (ms-swift)."""
    turns = conversation_turns(row, context)
    losers = row["rejected_response"] if isinstance(row["rejected_response"], list) else [row["rejected_response"]]
    rejected = [[text_turn("assistant", item, context, key="rejected_response")] for item in losers]
    return _Comparison(turns[:-1], turns[-1:], rejected)


def _read_two_conversations(chosen_key: str, rejected_key: str) -> Callable[[Row, RowContext], _Comparison]:
    """Two whole conversations that share their beginning (ms-swift, LLaMA-Factory v1, TRL without a prompt)."""

    def read(row: Row, context: RowContext) -> _Comparison:
        system = system_turn(row, context)
        chosen = read_turns(row[chosen_key], context, key=chosen_key)
        rejected = read_turns(row[rejected_key], context, key=rejected_key)
        return _split_prompt(system + chosen, system + rejected)

    return read


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Row, RowContext], _Comparison]], ...] = (
    (("chosen_messages", "rejected_messages"), _read_two_conversations("chosen_messages", "rejected_messages")),
    (("messages", "rejected_messages"), _read_two_conversations("messages", "rejected_messages")),
    (("prompt", "chosen", "rejected"), _read_prompted),
    (("question", "chosen", "rejected"), _read_question),
    (("conversations", "chosen", "rejected"), _read_ranking),
    (("messages", "chosen", "rejected"), _read_ranking),
    (("chosen", "rejected"), _read_two_conversations("chosen", "rejected")),
    (("messages", "rejected_response"), _read_rejected_response),
    (("conversations", "rejected_response"), _read_rejected_response),
    (("query", "rejected_response"), _read_rejected_response),
)


def _read_answer(row: Row, key: str, context: RowContext) -> list[Turn]:
    if isinstance(row[key], str):
        return [text_turn("assistant", row[key], context, key=key)]
    return read_turns(row[key], context, key=key)


def _split_prompt(chosen: list[Turn], rejected: list[Turn]) -> _Comparison:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    # Equal answers leave nothing behind the shared part; keep the last turn, so that the message says so.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return _Comparison(chosen[:shared], chosen[shared:], [rejected[shared:]])


def _words(turn: Turn) -> str:
    return " ".join("".join(piece.text for piece in turn.pieces if isinstance(piece, Text)).split())


def _finish(turns: list[Turn], what: str) -> tuple[Message, ...]:
    messages = to_messages(turns, ())
    check_conversation(messages, starts_with="assistant", what=f"{what} answer")
    return messages


def _texts(messages: Sequence[Message]) -> list[str]:
    return [message.text.strip() for message in messages]


def _unpack_text(row: Row) -> Row:
    """RLHF-V keeps question and answers as JSON inside the string `text`."""
    text = row.get("text")
    if not isinstance(text, str) or row.get("chosen") is not None:
        return row
    try:
        inner: Any = json.loads(text)
    except ValueError:
        inner = None
    if not isinstance(inner, dict):
        message = "`text` is not a JSON object of question, chosen and rejected"
        raise DataError(Problem(message, key="text", remedy='write {"question", "chosen", "rejected"} as JSON'))
    return {**row, **inner}
