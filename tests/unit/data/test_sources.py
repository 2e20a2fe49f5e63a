"""Files, folders, shards and tars as rows by number, with the place of each."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triptych.core.errors import DataError
from triptych.data.images import read_encoded
from triptych.data.sources import RowSource, data_files, open_source


def _open(folder: Path, name: str, content: str | bytes) -> RowSource:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_source(path, name)


def _rows(source: RowSource) -> list[Any]:
    return [source.row(index) for index in range(len(source))]


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


class TestJson:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        rows=st.lists(
            st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3), min_size=1
        ),
        indent=st.sampled_from([None, 0, 2]),
        is_ascii=st.booleans(),
    )
    def test_a_list_is_read_back_and_lines_are_true(
        self, tmp_path: Path, rows: list[Any], indent: int | None, is_ascii: bool
    ) -> None:
        text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "replace").decode()
        source = _open(tmp_path, "a.json", text)
        assert _rows(source) == json.loads(text)
        lines = text.split("\n")
        for index in range(len(source)):
            assert "{" in lines[source.place(index)[1] - 1]

    def test_lines_of_rows_by_hand(self, tmp_path: Path) -> None:
        source = _open(tmp_path, "a.json", '\ufeff[\n  {"a": "ü\\n"},\n\n  {"b":\n 2}, {"c": 3}\n]\n')
        assert _rows(source) == [{"a": "ü\n"}, {"b": 2}, {"c": 3}]
        assert [source.place(index)[1] for index in range(3)] == [2, 4, 5]

    def test_one_object_a_line_whatever_the_ending(self, tmp_path: Path) -> None:
        text = '{"a": 1}\n\n{"a": 2}\n'
        for name in ("a.json", "a.jsonl", "a.ndjson"):
            source = _open(tmp_path, name, "\ufeff" + text)
            assert _rows(source) == [{"a": 1}, {"a": 2}]
            assert [source.place(index) for index in range(2)] == [(name, 1), (name, 3)]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                '[{"a": 1},\n]',
                "a.json:2: not valid JSON at line 2, column 1: .*\n.*remove the comma at the end of line 1",
            ),
            ('[{"a": 1}\n {"a": 2}]', "at line 2, column 2: Expecting ',' or ']' after a row"),
            ('[{"a": 1},\n{"a": 2}', "at line 2, column 9.*\n.*ends too early"),
            ('[{"a": 1}] x', "line 1, column 12: Extra data"),
            ('{"a": {\n "b": 1,\n}}', "line 3, column 1"),
            ('"text"', "Expecting a list of rows"),
            ("", "Expecting a list of rows"),
            ("[]", "holds no rows"),
            ('{"a": 1}', r"holds one object \(keys `a`\), not rows"),
            ('{"set": {"root": "x", "annotation": "y.jsonl"}}', "InternVL index: list its annotation files"),
        ],
    )
    def test_a_file_that_is_no_list_of_rows(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(DataError, match=said):
            _open(tmp_path, "a.json", text)

    def test_not_utf8(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"a.json:2: not UTF-8 at byte 9"):
            _open(tmp_path, "a.json", b'[\n{"a": "\xe9"}]')


class TestTar:
    def test_members_that_share_a_stem_are_a_row(self, tmp_path: Path) -> None:
        members = [("x/0.jpg", b"J"), ("x/0.txt", "ü".encode()), ("x/0.json", b'{"k": 1}'), ("x/1.JPG", b"K")]
        source = _open(tmp_path, "a.tar", _tar(members))
        first, second = _rows(source)
        assert (first.pop("jpg").name, read_encoded(source.row(0)["jpg"])) == ("x/0.jpg", b"J")
        assert first == {"__key__": "x/0", "txt": "ü", "json": {"k": 1}}
        assert list(second) == ["__key__", "jpg"]
        assert read_encoded(second["jpg"]) == b"K"
        assert source.place(1) == ("a.tar", 2)

    def test_other_members_are_left_where_they_are(self, tmp_path: Path) -> None:
        (row,) = _rows(_open(tmp_path, "a.tar", _tar([("0.pyd", b"cos\nsystem\n"), ("0.jpg", b"")])))
        assert (row["pyd"].path, row["pyd"].size, row["pyd"].data) == (str(tmp_path / "a.tar"), 11, None)
        assert row["jpg"] == b""

    def test_broken_members_are_errors_of_their_row(self, tmp_path: Path) -> None:
        members = [("0.json", b"{"), ("1.txt", b"\xff"), ("2.txt", b"a"), ("2.txt", b"b"), ("3.txt", b"fine")]
        source = _open(tmp_path, "a.tar", _tar(members))
        for index, said in enumerate(["member `0.json`", "member `1.txt` is not UTF-8", "more than one member `.txt`"]):
            with pytest.raises(DataError, match=said) as caught:
                source.row(index)
            assert caught.value.problems[0].line == index + 1
        assert source.row(3)["txt"] == "fine"

    @pytest.mark.parametrize("cut", [100, 700, 1030])
    def test_an_incomplete_or_foreign_archive(self, tmp_path: Path, cut: int) -> None:
        whole = _tar([("0.txt", b"x" * 600), ("1.txt", b"y")])
        with pytest.raises(DataError, match=r"a.tar: cannot be read as a plain tar"):
            _open(tmp_path, "a.tar", whole[:cut])
        with pytest.raises(DataError, match="cannot be read as a plain tar"):
            _open(tmp_path, "b.tar", b"no archive at all" * 100)


class TestFolders:
    def test_shards_in_order_with_their_own_places(self, tmp_path: Path) -> None:
        folder = tmp_path / "shards"
        folder.mkdir()
        (folder / "b.jsonl").write_text('{"n": 3}\n')
        (folder / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
        source = open_source(folder, "shards")
        assert [row["n"] for row in _rows(source)] == [1, 2, 3]
        assert [source.place(index) for index in range(3)] == [
            ("shards/a.jsonl", 1),
            ("shards/a.jsonl", 2),
            ("shards/b.jsonl", 1),
        ]
        assert len(open_source(tmp_path / "shards/*.jsonl", "shards/*.jsonl")) == 3

    def test_a_folder_of_several_kinds_or_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="neither shards nor a saved data set"):
            open_source(tmp_path, "data")
        (tmp_path / "a.jsonl").write_text("{}\n")
        (tmp_path / "a.csv").write_text("a\n1\n")
        with pytest.raises(DataError, match=r"several kinds \(.csv, .jsonl\)"):
            open_source(tmp_path, "data")

    def test_several_splits_must_be_told_apart(self, tmp_path: Path) -> None:
        part = datasets.Dataset.from_dict({"a": [1]})
        datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "d"))
        with pytest.raises(DataError, match=r"several splits: test, train\n.*`path: d/test`"):
            open_source(tmp_path / "d", "d")
        assert _rows(open_source(tmp_path / "d/train", "d/train")) == [{"a": 1}]

    def test_parquet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(str(tmp_path / "a.parquet"))
        source = open_source(tmp_path / "a.parquet", "a.parquet")
        assert _rows(source) == [{"a": 1}, {"a": 2}]
        assert source.place(1) == ("a.parquet", 2)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            _open(tmp_path, "b.parquet", b"PAR1 no")

    def test_unknown_endings_and_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"unknown kind of data file `.pkl`"):
            _open(tmp_path, "a.pkl", b"x")
        with pytest.raises(DataError, match=r"did you mean `a.pkl`"):
            open_source(tmp_path / "b.pkl", "b.pkl")
        with pytest.raises(DataError, match="does not exist"):
            open_source(tmp_path / "none/b.json", "none/b.json")


class TestDataFiles:
    def test_a_file_a_pattern_and_a_folder_of_shards_with_pictures_beside_them(self, tmp_path: Path) -> None:
        for name in ("a.jsonl", "b.jsonl", "1.png"):
            (tmp_path / name).write_text("{}")
        one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        assert data_files(one, "in/a.jsonl") == {"in/a.jsonl": one}
        assert data_files(tmp_path / "*.jsonl", "*.jsonl") == {str(one): one, str(two): two}
        assert data_files(tmp_path, "in/") == {"in/a.jsonl": one, "in/b.jsonl": two}

    def test_a_saved_data_set(self, tmp_path: Path) -> None:
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(str(tmp_path / "set"))
        assert "set/train/data-00000-of-00001.arrow" in data_files(tmp_path / "set", "set")
