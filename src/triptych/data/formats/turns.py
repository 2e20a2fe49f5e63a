"""Turns of every dialect -> messages: roles, order, weights and emptiness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triptych.core.config import did_you_mean
from triptych.core.errors import DataError, Problem
from triptych.core.types import ImageReference, Message, Role, Text
from triptych.data.formats.base import RowContext
from triptych.data.formats.parts import Piece, fill_slots, read_content

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

_WEIGHT_KEYS = ("loss", "loss_weight", "loss_scale", "weight")
# Keys that would change what the model sees: a row that has them must not be trained on as if it had not.
_DROP = "drop it"
_UNSUPPORTED = {
    "video": ("videos", _DROP),
    "videos": ("videos", _DROP),
    "audio": ("sound", _DROP),
    "audios": ("sound", _DROP),
    "tools": ("tool descriptions", _DROP),
    "objects": ("boxes of ms-swift", _DROP),
}
"""Key -> (what it holds, remedy)."""
_COMPARED = "use `format: preference` in a recipe of stage preference, or drop it"
_COMPARISONS = ("chosen", "rejected", "rejected_response", "chosen_messages", "rejected_messages")
_UNSUPPORTED_IN_CONVERSATION = dict.fromkeys(_COMPARISONS, ("an answer to compare with", _COMPARED))
_OWN_PICTURES = "move its pictures to the row's `images`, or write them as parts of the content"
_UNSUPPORTED_IN_TURN = {
    "tool_calls": ("calls of tools", _DROP),
    "function_call": ("calls of tools", _DROP),
    "reasoning_content": ("reasoning apart from the answer", _DROP),
    "images": ("pictures of its own", _OWN_PICTURES),
    "image": ("a picture of its own", _OWN_PICTURES),
}


@dataclass(frozen=True)
class Turn:
    """A turn whose placeholders are not yet filled."""

    role: Role
    pieces: tuple[Piece, ...]
    weight: float = 1.0


def refuse_unsupported(row: dict[str, Any]) -> None:
    """Raise DataError where a row holds what no format can use and would silently leave out."""
    _refuse(row, _UNSUPPORTED, "the row")


def refuse_comparisons(row: dict[str, Any]) -> None:
    """Raise DataError where a row of one answer says that the answer is bad, or holds another one to compare with."""
    _refuse(row, _UNSUPPORTED_IN_CONVERSATION, "the row")
    if isinstance(row.get("label"), bool):
        message = f"the row says whether its answer is wanted (`label: {str(row['label']).lower()}`), not supported"
        raise DataError(Problem(message, key="label", remedy="drop unwanted answers, then drop `label`"))


def _refuse(record: dict[str, Any], unsupported: Mapping[str, tuple[str, str]], name: str) -> None:
    for key, (what, remedy) in unsupported.items():
        if record.get(key):
            raise DataError(Problem(f"{name} has {what} (`{key}`), not supported", key=key, remedy=remedy))


def read_turns(entries: Any, context: RowContext, *, key: str) -> list[Turn]:
    """Read a list of `{"role", "content"}` or `{"from", "value"}` objects.

    Args:
        entries: the list (one object counts as a list of one).
        context: of the row.
        key: field that held it, for messages.

    Raises:
        DataError: not a list of objects, an unknown role, or content that cannot be read.
    """
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list) or not entries:
        raise DataError(Problem(f"`{key}` is not a list of turns", key=key, remedy="give at least one turn"))
    turns: list[Turn] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            message = f"turn {number} is not an object"
            raise DataError(Problem(message, key=key, remedy='write {"role": "user", "content": "..."}'))
        turns.extend(_read_entry(entry, number, context, key))
    return turns


def system_turn(row: dict[str, Any], context: RowContext) -> list[Turn]:
    """A system turn from a row's `system` or `system_prompt`; none where both are missing or empty.

    Raises:
        DataError: it is not text, or the two differ.
    """
    given = {key: row[key] for key in ("system", "system_prompt") if row.get(key)}
    if len(set(map(str, given.values()))) > 1:
        message = "`system` and `system_prompt` differ"
        raise DataError(Problem(message, key="system_prompt", remedy="keep one of them"))
    for key, text in given.items():
        if not isinstance(text, str):
            raise DataError(Problem(f"`{key}` is not text", key=key, remedy="write one string"))
        return [Turn("system", tuple(read_content(text, context)))]
    return []


def text_turn(role: Role, text: Any, context: RowContext, *, key: str) -> Turn:
    """A turn from a plain string field.

    Raises:
        DataError: the field is missing or not text.
    """
    if not isinstance(text, str):
        problem = "is missing" if text is None else "is not text"
        raise DataError(Problem(f"`{key}` {problem}", key=key, remedy=f'write "{key}": "..."'))
    return Turn(role, tuple(read_content(text, context)))


def to_messages(
    turns: Sequence[Turn], pictures: Sequence[ImageReference], *, prepend: bool = False
) -> tuple[Message, ...]:
    """Fill the placeholders and drop empty system turns.

    `prepend` puts the pictures of a row without placeholders at the start of its first user turn.

    Raises:
        DataError: as `fill_slots`.
    """
    head = [turn for turn in turns[:1] if turn.role == "system"]
    rest = turns[len(head) :]
    filled = fill_slots([turn.pieces for turn in head], ()) if prepend else []
    filled += fill_slots([turn.pieces for turn in (rest if prepend else turns)], pictures, prepend=prepend)
    messages = [Message(turn.role, parts, turn.weight) for turn, parts in zip(turns, filled, strict=True)]
    return tuple(message for message in messages if message.role != "system" or message.parts)


def check_conversation(
    messages: Sequence[Message], *, starts_with: Role = "user", ends_with: Role = "assistant", what: str = "row"
) -> None:
    """Check roles, order and emptiness.

    A system turn may stand first; then turns of user and assistant alternate from `starts_with` to `ends_with`.

    Raises:
        DataError: naming the turn and the rule; `what` is how the message calls these turns.
    """
    offset = 1 if messages and messages[0].role == "system" else 0
    if offset and messages[0].images:
        raise DataError(Problem(f"the system turn of the {what} holds a picture", remedy="move it to a user turn"))
    expected: Role = starts_with
    for number, message in enumerate(messages[offset:], offset + 1):
        if message.role != expected:
            text = f"turn {number} of the {what} is from `{message.role}` where `{expected}` is expected"
            remedy = "turns alternate user, assistant, ...; one system turn may stand first"
            raise DataError(Problem(text, remedy=remedy))
        _check_turn(message, f"turn {number} of the {what}")
        expected = "user" if expected == "assistant" else "assistant"
    last = messages[-1].role if len(messages) > offset else None
    if last != ends_with:
        text = f"the {what} ends with " + (f"a turn from `{last}`, not from `{ends_with}`" if last else "no turn")
        raise DataError(Problem(text, remedy="add the missing answer, or drop the unanswered turn"))


def _check_turn(message: Message, name: str) -> None:
    if message.role == "assistant":
        if message.images:
            text = f"{name} is an answer with a picture in it, which no language model can be taught to write"
            raise DataError(Problem(text, remedy="move the picture to a user turn"))
        if not message.text.strip():
            raise DataError(Problem(f"{name} is an empty answer", remedy="write the answer or drop the turn"))
    elif not message.images and not message.text.strip():
        raise DataError(Problem(f"{name} from `{message.role}` is empty", remedy="write it or drop it"))


def _read_entry(entry: dict[str, Any], number: int, context: RowContext, key: str) -> list[Turn]:
    name = entry.get("role") if entry.get("role") is not None else entry.get("from")
    content = entry.get("content") if entry.get("content") is not None else entry.get("value")
    if name is None:
        message = f"turn {number} has no role"
        raise DataError(Problem(message, key=key, remedy='add "role" (or "from")'))
    _refuse(entry, _UNSUPPORTED_IN_TURN, f"turn {number}")
    if content is None:
        message = f"turn {number} has no content"
        raise DataError(Problem(message, key=key, remedy='add "content" (or "value")'))
    weight = _read_weight(entry, number)
    if name == "pretrain":
        return _read_pretrain(read_content(content, context), weight, number)
    role = ROLES.get(str(name).lower())
    if role is None:
        message = f"turn {number} has the unknown role `{name}`"
        raise DataError(Problem(message, key=key, remedy=did_you_mean(str(name), ROLES)))
    if role != "assistant" and weight not in (None, 0.0):
        message = f"turn {number} from `{name}` asks for loss weight {weight}, but only answers are supervised"
        raise DataError(Problem(message, key=key, remedy="remove the weight, or set it to 0"))
    pieces = read_content(content, context)
    return [Turn(role, tuple(pieces), 1.0 if weight is None or role != "assistant" else weight)]


def _read_pretrain(pieces: Sequence[Piece], weight: float | None, number: int) -> list[Turn]:
    """xtuner's role `pretrain`: pictures and the text to be learned, which is a caption pair."""
    first_text = next((index for index, piece in enumerate(pieces) if isinstance(piece, Text)), len(pieces))
    pictures, text = pieces[:first_text], pieces[first_text:]
    captions = [piece for piece in text if isinstance(piece, Text)]
    if not pictures or len(captions) != len(text):
        message = f"turn {number} of role `pretrain` is not pictures followed by text"
        raise DataError(Problem(message, remedy="only caption pairs can be read from this role"))
    captions[:1] = [Text(piece.text.lstrip("\n")) for piece in captions[:1]]  # the line break behind the marker
    return [Turn("user", tuple(pictures)), Turn("assistant", tuple(captions), 1.0 if weight is None else weight)]


def _read_weight(entry: dict[str, Any], number: int) -> float | None:
    for key in _WEIGHT_KEYS:
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or value < 0:
            message = f"turn {number} has `{key}: {value}`"
            raise DataError(Problem(message, key=key, remedy="a loss weight is true, false or a number >= 0"))
        return float(value)
    return None
