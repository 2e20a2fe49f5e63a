"""What all formats share: pictures of a record, ids, and errors that get their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.formats.reading import open_rows, picture
from triptych.core.errors import DataError, Problem
from triptych.core.types import Origin
from triptych.data.formats.base import RowContext, located


def test_an_error_gets_file_and_line_unless_it_has_them() -> None:
    error = DataError([Problem("one"), Problem("two", file="other.tar", line=7)])
    first, second = located(error, Origin("a.json", 3)).problems
    assert (first.file, first.line) == ("a.json", 3)
    assert (second.file, second.line) == ("other.tar", 7)


def test_a_picture_is_a_name_bytes_or_both(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    context = RowContext(tmp_path, Origin("rows.jsonl", 1), "")
    assert context.picture("1.jpg") == context.picture({"path": "1.jpg", "bytes": None}) != context.picture(b"x")
    assert context.picture({"bytes": b"x", "path": "1.jpg"}).data == b"x"
    with pytest.raises(DataError, match="is not a picture"):
        context.picture({"width": 3})


@pytest.mark.requirement("A-2")
def test_ids_are_taken_from_the_row_or_made_from_file_and_row_number(tmp_path: Path) -> None:
    turns = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    dataset = open_rows(tmp_path, "llava", {**turns, "id": "x"}, {**turns, "id": 0}, turns, {**turns, "id": None})
    assert [dataset.sample(index).origin.id for index in range(4)] == ["x", "0", "rows-3", "rows-4"]
    assert dataset.origin(0) == Origin("rows.jsonl", 1)
