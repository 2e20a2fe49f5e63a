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


TURNS = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize(("value", "weight"), [(2, 2.0), (0.5, 0.5), ("0.25", 0.25), (None, 1.0), ("", 1.0)])
def test_a_row_may_have_a_weight(tmp_path: Path, key: str, value: object, weight: float) -> None:
    assert open_rows(tmp_path, "llava", {**TURNS, key: value}).sample(0).weight == weight


def test_the_weight_of_a_comparison_is_that_of_its_pair(tmp_path: Path) -> None:
    sample = open_rows(tmp_path, "preference", {"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 3}).sample(0)
    assert sample.preference is not None
    assert ([pair.weight for pair in sample.preference.pairs], sample.weight) == ([3.0], 3.0)


@pytest.mark.parametrize("value", [0, -1, True, False, "much", [1], float("inf"), 10**400])
def test_any_other_weight_of_a_row_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: weight: the row has `weight: .*\n.*drop it from the file"):
        open_rows(tmp_path, "llava", {**TURNS, "weight": value}).sample(0)


def test_two_weights_of_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="both `weight` and `loss_weight`"):
        open_rows(tmp_path, "llava", {**TURNS, "weight": 1, "loss_weight": 2}).sample(0)


def test_the_fingerprint_changes_with_the_rows(tmp_path: Path) -> None:
    first = open_rows(tmp_path, "llava", TURNS).fingerprint()
    assert list(first) == ["rows.jsonl"]
    assert open_rows(tmp_path, "llava", TURNS).fingerprint() == first
    assert open_rows(tmp_path, "llava", {**TURNS, "id": 1}).fingerprint() != first
