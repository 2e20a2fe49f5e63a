"""Rows about the same pictures have the same number."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter

from triptych.data.formats import Dataset, DatasetConfig, open_dataset
from triptych.data.grouping import picture_groups
from triptych.data.scene_files import Sizes, write_scenes


class Pictured:
    """Rows that show the named pictures."""

    def __init__(self, rows: list[tuple[str, ...] | None]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def picture_key(self, index: int) -> tuple[str, ...] | None:
        return self._rows[index]


def test_groups_are_those_of_the_pictures_over_all_data_sets() -> None:
    first = Pictured([("a",), ("b",), ("a",), None, None, ("a", "b")])
    second = Pictured([("b",), None, ("b", "a"), ("a",), None])
    one, two = picture_groups([first, second])
    assert one[0] == one[2] == two[3]
    assert one[1] == two[0]
    # a, b, a-b, b-a, and one each for four rows without pictures
    assert sorted({*one, *two}) == list(range(8))


def _open(folder: Path, format: str, name: str) -> Dataset:
    images = None if name.endswith(("parquet", "tar")) else "pictures"
    config = {"format": format, "path": name, "images": images}
    return open_dataset(TypeAdapter(DatasetConfig).validate_python(config), folder)


def test_keys_come_from_the_data_files_alone(tmp_path: Path) -> None:
    write_scenes(tmp_path, Sizes(train=6, test=4))
    questions = [_open(tmp_path, "messages", f"questions/{task}.jsonl") for task in ("presence", "naming")]
    captions = _open(tmp_path, "captions", "train_dense.tsv")
    pairs = _open(tmp_path, "preference", "preferences.jsonl")
    inside = [_open(tmp_path, "texts", "validation.parquet"), _open(tmp_path, "captions", "validation.tar")]
    datasets = [*questions, captions, pairs, *inside]
    before = picture_groups(datasets)
    # A question, a caption and a pair about a scene; not every scene allows every question.
    assert before[0] == before[2] == before[3] == list(range(6)) and set(before[1]) < set(before[0])
    # Rows that hold their pictures are taken for different ones without reading them.
    assert len({*before[4], *before[5]}) == len(before[4]) + len(before[5])
    for picture in (tmp_path / "pictures").iterdir():
        picture.unlink()
    assert picture_groups(datasets) == before


def test_pictures_spelled_out_in_rows_and_rows_that_cannot_be_read(tmp_path: Path) -> None:
    url = "data:image/png;base64," + "A" * 4000
    rows = [{"image": url}, {"image": url}, {"image": url + "B"}, {"conversations": []}]
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns, **row} for row in rows]))
    config = TypeAdapter(DatasetConfig).validate_python({"format": "llava", "path": "rows.json"})
    keys = [open_dataset(config, tmp_path).picture_key(index) for index in range(4)]
    assert keys[0] == keys[1] != keys[2] and keys[3] is None
    assert keys[0] is not None and max(map(len, keys[0])) < 200 + len(str(tmp_path))
