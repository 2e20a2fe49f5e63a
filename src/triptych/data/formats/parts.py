"""Message content of every dialect -> parts in order, placeholders matched to pictures.

    content (str or list of parts) --read_content--> Text | Slot | ImageReference --fill_slots--> Text | ImageReference

A slot is a place for a picture of the row's own list; a dialect that puts the picture into the part itself needs none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triptych.core.errors import DataError, Problem
from triptych.core.types import ImageReference, Part, Text
from triptych.data.formats.base import RowContext


@dataclass(frozen=True)
class Slot:
    """A placeholder."""

    spelling: str
    number: int | None = None
    """1-based picture number of `<image2>` or `<image_2>`."""


Piece = Text | Slot | ImageReference

# `<image>`, `<image2>`, `<image_2>`, `<image id='x'>`
_PLACEHOLDER = re.compile(r"""<image(?:_?(?P<number>\d+)|\s+id\s*=\s*(?P<id>"[^"<>]*"|'[^'<>]*'))?>""")
_OTHER_MEDIA = re.compile("<(video|audio)>")
_CONTENT_MARKER = "<IMG_CONTEXT>"
_INLINE_PATH = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_TEXT_KEYS = ("text", "value", "content")
_PICTURE_KEYS = ("image_url", "image", "path", "url", "value", "content", "base64")


def read_text(text: str, context: RowContext) -> list[Piece]:
    """Cut text at its placeholders; `<img>path</img>` (ms-swift, Qwen-VL) is a picture.

    Raises:
        DataError: an inline picture cannot be located, or a picture number is 0.
    """
    pieces: list[Piece] = []
    for index, chunk in enumerate(_INLINE_PATH.split(text)):
        if index % 2:
            pieces.append(context.picture(chunk))
        else:
            pieces.extend(_cut(chunk))
    return pieces


def read_content(content: Any, context: RowContext) -> list[Piece]:
    """Read message content: a string, or a list of parts.

    A text part holds its text under `text`, `value` or `content`; a picture part (`image` or `image_url`) its picture
    under `image_url`, `image`, `path`, `url`, `value`, `content` or `base64`, plain or inside an object, or nothing,
    when it stands for the next picture of the row.

    Raises:
        DataError: a part is of an unknown type, lacks its text, or names a picture that cannot be located.
    """
    if isinstance(content, str):
        return read_text(content, context)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        message = f"content is {_kind(content)}, not text or a list of parts"
        raise DataError(Problem(message, remedy='write "content": "..." or a list of {"type": ...} parts'))
    pieces: list[Piece] = []
    for part in content:
        pieces.extend(_read_part(part, context))
    return _place_at_markers(pieces)


def fill_slots(
    turns: Sequence[Sequence[Piece]], pictures: Sequence[ImageReference], *, prepend: bool = False
) -> list[tuple[Part, ...]]:
    """Put the row's pictures into the slots of its turns, in order or by number.

    Args:
        turns: pieces of each turn.
        pictures: the row's own list, without those that parts carry themselves.
        prepend: a row without any slot has its pictures put at the start of its first turn (formats whose rows
            never have placeholders).

    Raises:
        DataError: the number of placeholders and pictures differ, spellings are mixed, or a number repeats.
    """
    slots = [piece for turn in turns for piece in turn if isinstance(piece, Slot)]
    if prepend and not slots and turns:
        turns = [[*pictures, *turns[0]], *turns[1:]]
        pictures = []
    if len(slots) != len(pictures):
        raise DataError(_mismatch(slots, pictures))
    order = _picture_order(slots)
    chosen = iter([pictures[index] for index in order])
    filled = [[next(chosen) if isinstance(piece, Slot) else piece for piece in turn] for turn in turns]
    return [tuple(piece for piece in turn if not isinstance(piece, Text) or piece.text) for turn in filled]


def row_pictures(row: dict[str, Any], context: RowContext) -> list[ImageReference]:
    """The pictures of `image` (one or a list) or `images`, in order.

    Raises:
        DataError: both keys hold pictures, or one cannot be located.
    """
    found = {key: _as_list(row.get(key)) for key in ("image", "images")}
    if found["image"] and found["images"]:
        raise DataError(Problem("the row has both `image` and `images`", key="images", remedy="keep one of them"))
    return [context.picture(value) for value in (found["image"] or found["images"])]


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _cut(text: str) -> list[Piece]:
    other = _OTHER_MEDIA.search(text)
    if other:
        message = f"the placeholder `{other[0]}` stands for what no model here can see or hear"
        raise DataError(Problem(message, remedy="drop the row; write the word differently where text is meant"))
    pieces: list[Piece] = []
    position = 0
    for match in _PLACEHOLDER.finditer(text):
        if match.start() > position:
            pieces.append(Text(text[position : match.start()]))
        pieces.append(Slot(match[0], int(match["number"]) if match["number"] else None))
        position = match.end()
    if position < len(text):
        pieces.append(Text(text[position:]))
    return pieces


def _read_part(part: Any, context: RowContext) -> list[Piece]:
    if isinstance(part, str):
        return read_text(part, context)
    if not isinstance(part, dict):
        message = f"a content part is {_kind(part)}, not an object"
        raise DataError(Problem(message, remedy='write {"type": "text", "text": "..."}'))
    kind = part.get("type")
    if kind == "text":
        text = next((part[key] for key in _TEXT_KEYS if isinstance(part.get(key), str)), None)
        if text is None:
            raise DataError(Problem("a text part has no text", remedy='write {"type": "text", "text": "..."}'))
        # xtuner puts its marker into the text of a message whose pictures are parts.
        pieces: list[Piece] = []
        for index, chunk in enumerate(text.split(_CONTENT_MARKER)):
            pieces.extend([Slot(_CONTENT_MARKER)] if index else [])
            pieces.extend(read_text(chunk, context))
        return pieces
    if kind in ("image", "image_url"):
        value = next((part[key] for key in _PICTURE_KEYS if part.get(key) is not None), None)
        return [Slot(f'{{"type": "{kind}"}}') if value is None else context.picture(value)]
    message = f"content part of type `{kind}` is not supported"
    raise DataError(Problem(message, remedy="supported: text, image, image_url"))


def _place_at_markers(pieces: list[Piece]) -> list[Piece]:
    """Pictures of xtuner come as parts, in any place, *and* have a marker each in the text: they go there."""
    pictures = [piece for piece in pieces if isinstance(piece, ImageReference)]
    marker = Slot(_CONTENT_MARKER)
    if not pictures or pieces.count(marker) != len(pictures):
        return pieces
    waiting = iter(pictures)
    kept = [piece for piece in pieces if not isinstance(piece, ImageReference)]
    return [next(waiting) if piece == marker else piece for piece in kept]


def _picture_order(slots: Sequence[Slot]) -> list[int]:
    numbers = [slot.number for slot in slots if slot.number is not None]
    if not numbers:
        spellings = [slot.spelling for slot in slots if " " in slot.spelling and slot.spelling.startswith("<image")]
        repeated = next((item for item in spellings if spellings.count(item) > 1), None)
        if repeated:
            message = f"placeholder `{repeated}` stands {spellings.count(repeated)} times"
            raise DataError(Problem(message, remedy="a picture is placed once; refer back to it in words"))
        return list(range(len(slots)))
    if len(numbers) < len(slots):
        message = "numbered placeholders (`<image1>`) and plain ones (`<image>`) are mixed"
        raise DataError(Problem(message, remedy="use one spelling in a row"))
    if sorted(numbers) != list(range(1, len(slots) + 1)):
        shown = ", ".join(slot.spelling for slot in slots)
        message = f"placeholders {shown} do not number {len(slots)} pictures 1 to {len(slots)}, each once"
        raise DataError(Problem(message, remedy="count from 1 and place each picture once; refer back in words"))
    return [number - 1 for number in numbers]


def _mismatch(slots: Sequence[Slot], pictures: Sequence[ImageReference]) -> Problem:
    spelling = slots[0].spelling if slots else "<image>"
    count = f"{len(slots)} placeholder{'s' * (len(slots) != 1)} ({spelling})" if slots else "no placeholder (<image>)"
    message = f"the row has {count} for {len(pictures)} picture{'s' * (len(pictures) != 1)}"
    if len(slots) > len(pictures):
        remedy = "add the missing pictures or remove placeholders; write the word differently where text is meant"
    else:
        remedy = "put `<image>` where each picture belongs, or drop pictures from the row"
    return Problem(message, remedy=remedy)


def _kind(value: Any) -> str:
    return {type(None): "missing", dict: "an object", list: "a list", bool: "true or false"}.get(
        type(value), f"`{str(value)[:40]}`"
    )
