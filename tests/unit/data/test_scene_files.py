"""The written files agree with each other, are read by every reader, and are equal for equal sizes."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter

from triptych.data.formats import DatasetConfig, open_dataset
from triptych.data.images import decode
from triptych.data.scene_files import Sizes, write_scenes
from triptych.data.scenes import COUNTS, PLACES, is_held_out_count, is_held_out_place, sample_scene

SIZES = Sizes(train=24, test=4)
FILES = {
    "train.json": "llava",
    "train_others.json": "llava",
    "questions/presence.jsonl": "messages",
    "questions/dense_caption.jsonl": "messages",
    "train_dense.tsv": "captions",
    "validation_brief.tsv": "captions",
    "test.json": "llava",
    "validation_questions.json": "llava",
    "test_others.json": "llava",
    "combinations.json": "llava",
    "preferences.jsonl": "preference",
    "validation.parquet": "texts",
    "validation.tar": "captions",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    assert write_scenes(folder, SIZES)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_with_its_pictures(folder: Path, name: str) -> None:
    config = {"format": FILES[name], "path": name, "images": "pictures"}
    dataset = open_dataset(TypeAdapter(DatasetConfig).validate_python(config), folder)
    assert len(dataset) > 0
    samples = [dataset.sample(index) for index in range(len(dataset))]
    assert len({sample.origin.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.images
        assert all(decode(image).size == (96, 96) for image in sample.images)


def test_test_rows_take_turns_and_have_scenes_of_their_own(folder: Path) -> None:
    rows = json.loads((folder / "test.json").read_text())
    assert [row["task"] for row in rows[:5]] == ["presence", "counting", "position", "naming", "caption"]
    assert len(rows) == 5 * SIZES.test
    assert len({row["image"] for row in rows}) == len(rows)


def test_every_question_about_combinations_asks_for_one(tmp_path: Path) -> None:
    write_scenes(tmp_path, Sizes(train=1, test=120))
    rows = json.loads((tmp_path / "combinations.json").read_text())
    asked = Counter(row["task"] for row in rows)
    assert asked == {"counting": 30, "position": 30, "caption": 30}
    for row in rows:
        scene = sample_scene("combinations", 0, int(row["image"].removesuffix(".png").rpartition("-")[2]))
        question, answer = (turn["value"] for turn in row["conversations"])
        if row["task"] == "position":
            (item,) = scene.items
            assert item.name in question and answer == PLACES[item.place] and is_held_out_place(item.name, item.place)
        else:
            assert is_held_out_count(scene.target, scene.counts[scene.target])
            number = COUNTS[scene.counts[scene.target]]
            assert number in answer.lower() or row["task"] == "counting"


def test_a_marker_that_was_cut_off_is_no_marker(tmp_path: Path) -> None:
    assert write_scenes(tmp_path, Sizes(train=2, test=1)) and not write_scenes(tmp_path, Sizes(train=2, test=1))
    (tmp_path / "scenes.json").write_text('{"train": 2')
    assert write_scenes(tmp_path, Sizes(train=2, test=1))


def test_splits_share_no_picture(folder: Path) -> None:
    contents: dict[bytes, str] = {}
    for path in sorted((folder / "pictures").iterdir()):
        split = path.name.split("-")[1 if path.name.startswith("other") else 0]
        assert contents.setdefault(Image.open(path).tobytes(), split) == split, path


def test_masks_fill_their_boxes(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "masks.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        left, top, right, bottom = row["box"]
        found = Image.open(folder / row["mask"]).getbbox()
        assert found is not None
        assert all(abs(a - b) <= 2 for a, b in zip(found, (left, top, right, bottom), strict=True))


def test_equal_sizes_give_equal_files_and_are_not_written_twice(folder: Path, tmp_path: Path) -> None:
    assert write_scenes(tmp_path, SIZES)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    for name in names:
        if not name.endswith(".parquet"):
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert not write_scenes(tmp_path, SIZES)
    assert write_scenes(tmp_path, Sizes(train=25, test=4))
