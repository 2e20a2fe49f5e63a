"""Placeholders to slots to pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core.errors import DataError
from triptych.core.types import ImageReference, Origin, Text
from triptych.data.formats.base import RowContext
from triptych.data.formats.parts import Slot, fill_slots, read_content, read_text

_CONTEXT = RowContext(Path("."), Origin("rows.jsonl", 1), "")


@pytest.mark.requirement("A-9")
def test_text_is_cut_at_placeholders_only() -> None:
    pieces = read_text("a<image>b<image_12>c <images> <image1x>", _CONTEXT)
    assert pieces == [Text("a"), Slot("<image>"), Text("b"), Slot("<image_12>", 12), Text("c <images> <image1x>")]


def test_pictures_without_placeholder_come_first_only_where_asked() -> None:
    picture = ImageReference(data=b"x")
    assert fill_slots([[Text("Q")]], [picture], prepend=True) == [(picture, Text("Q"))]
    with pytest.raises(DataError, match="no placeholder"):
        fill_slots([[Text("Q")]], [picture])


@pytest.mark.requirement("A-35")
@given(st.lists(st.text("ab \n<>", max_size=4), min_size=1, max_size=6))
def test_no_text_is_lost_between_pictures(chunks: list[str]) -> None:
    pictures = [ImageReference(data=bytes([index])) for index in range(len(chunks) - 1)]
    (parts,) = fill_slots([read_content("<image>".join(chunks), _CONTEXT)], pictures)
    assert [part for part in parts if isinstance(part, ImageReference)] == pictures
    assert "".join(part.text for part in parts if isinstance(part, Text)) == "".join(chunks)
