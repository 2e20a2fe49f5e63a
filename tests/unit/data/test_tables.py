"""CSV and TSV rows by number, with true line numbers; one broken row stays one broken row."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triptych.core.errors import DataError
from triptych.data.tables import DelimitedRows, parse_json


def _open(folder: Path, text: str, name: str = "rows.csv") -> DelimitedRows:
    (folder / name).write_bytes(text.encode())
    return DelimitedRows(folder / name, name)


def test_a_quoted_field_may_span_lines(tmp_path: Path) -> None:
    rows = _open(tmp_path, 'image,caption\n1.jpg,"one\ntwo"\n\n2.jpg,three\r\n')
    assert [rows.row(index) for index in range(len(rows))] == [
        {"image": "1.jpg", "caption": "one\ntwo"},
        {"image": "2.jpg", "caption": "three"},
    ]
    assert [rows.place(index) for index in range(2)] == [("rows.csv", 2), ("rows.csv", 5)]


def test_the_header_tells_the_separator(tmp_path: Path) -> None:
    rows = _open(tmp_path, "\ufefffilepath\ttitle\n1.jpg\ta, b\n")
    assert rows.row(0) == {"filepath": "1.jpg", "title": "a, b"}


def test_broken_rows_are_errors_of_their_own(tmp_path: Path) -> None:
    text = 'image,caption\n1.jpg,a\n2.jpg,a,b\n3.jpg,"a" b\n4.jpg,"open\n5.jpg,c\n'
    rows = _open(tmp_path, text)
    seen = {}
    for index in range(len(rows)):
        try:
            seen[rows.place(index)[1]] = rows.row(index)["caption"]
        except DataError as error:
            (problem,) = error.problems
            assert (problem.file, problem.line) == rows.place(index)
            seen[rows.place(index)[1]] = problem.message.split(":")[0]
    assert seen == {
        2: "a",
        3: "row has 3 fields, the header has 2",
        4: "row cannot be cut into fields",
        5: "row cannot be cut into fields",
        6: "c",
    }


def test_a_header_that_repeats_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column `a` more than once"):
        _open(tmp_path, "a,a\n1,2\n")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=6), st.text(min_size=1, max_size=6)), min_size=1, max_size=6))
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, table: list[tuple[str, str]]) -> None:
    table = [tuple(text.encode("utf-8", "ignore").decode().replace("\0", "") or "x" for text in row) for row in table]  # type: ignore[misc]
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("a", "b"), *table])
    rows = _open(tmp_path, stream.getvalue())
    assert [tuple(rows.row(index).values()) for index in range(len(rows))] == table


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1', "not valid JSON at line 9, column 8"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[1]", "row is a list"),
        (b'"x"', "row is a string"),
        (b"3", "row is `3`"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": [{"b": "q\\ud800"}]}', r"half of a surrogate pair \(`.ud800`\)"),
        (b'{"n": ' + b"1" * 5000 + b"}", "row cannot be used: Exceeds the limit"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key `b` stands twice"),
    ],
)
def test_json_rows_that_are_no_objects(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        parse_json(data, "rows.jsonl", 9)
    assert (caught.value.problems[0].file, caught.value.problems[0].line) == ("rows.jsonl", 9)


def test_escapes_that_are_text_are_read() -> None:
    assert parse_json(b'{"a": "\\ud83d\\udc36 \\u00e9"}', "rows.jsonl", 1) == {"a": "\U0001f436 é"}
