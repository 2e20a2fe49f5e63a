"""Captions from tables, JSON Lines, tars and Parquet."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tests.unit.data.formats.reading import open_file, open_rows, picture, read, shape
from triptych.core.errors import DataError
from triptych.data.formats.captions import BRIEF_PROMPTS
from triptych.data.images import decode, read_encoded, read_size


def _jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.requirement("A-4")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'image,caption\n1.jpg,"A dog, brown."\n'),
        ("rows.tsv", "image\tcaption\n1.jpg\tA dog, brown.\n"),
        ("open_clip.csv", "filepath\ttitle\n1.jpg\tA dog, brown.\n"),
        ("rows.jsonl", '{"image": "1.jpg", "caption": "A dog, brown."}\n'),
        ("rows.json", '[{"file_name": "1.jpg", "text": "A dog, brown."}]'),
    ],
)
def test_a_pair_is_a_picture_and_its_caption(tmp_path: Path, name: str, text: str) -> None:
    picture(tmp_path, "1.jpg")
    (tmp_path / name).write_text(text)
    sample = open_file(tmp_path, "captions", name).sample(0)
    assert shape(sample.messages) == [("user", ["[1.jpg]"]), ("assistant", ["A dog, brown."])]
    assert sample.task == "caption"


def test_columns_can_be_named(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    row = {"photo": "1.jpg", "alt": "A dog.", "caption": "something else"}
    sample = read(tmp_path, "captions", row, image_column="photo", text_column="alt")
    assert shape(sample.messages)[1] == ("assistant", ["A dog."])


def test_each_of_several_captions_is_a_sample(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    first = {"id": "a", "image": "1.jpg", "captions": ["one", "two"]}
    dataset = open_rows(tmp_path, "captions", first, {"id": "b", "image": "2.jpg", "captions": ["three"]})
    samples = [dataset.sample(index) for index in range(len(dataset))]
    assert [sample.messages[1].text for sample in samples] == ["one", "two", "three"]
    assert [sample.origin.id for sample in samples] == ["a#1", "a#2", "b#1"]
    assert [sample.origin.line for sample in samples] == [1, 1, 2]


def test_a_list_that_comes_late_is_an_error_not_its_first_caption(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    rows = [{"image": "1.jpg", "caption": f"c{number}"} for number in range(8)]
    late = open_rows(tmp_path, "captions", *rows, {"image": "1.jpg", "caption": ["x", "y"]})
    assert late.sample(7).messages[-1].text == "c7"
    with pytest.raises(DataError, match="the row holds 2 captions, the first rows of the file hold one each"):
        late.sample(8)
    assert len(open_rows(tmp_path, "captions", *rows[1:], {"image": "1.jpg", "caption": ["x", "y"]})) == 9


def test_prompts_stand_behind_the_picture_and_do_not_change_between_reads(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    rows = [{"image": "1.jpg", "caption": str(number)} for number in range(20)]
    dataset = open_rows(tmp_path, "captions", *rows, prompts="brief")
    asked = [dataset.sample(index).messages[0].text for index in range(20)]
    assert asked == [dataset.sample(index).messages[0].text for index in range(20)]
    assert {text.strip() for text in asked} <= set(BRIEF_PROMPTS)
    assert len(set(asked)) > 1


def test_webdataset_text_or_json_key(tmp_path: Path) -> None:
    meta = json.dumps({"caption": "from json", "width": 4}).encode()
    write_tar(
        tmp_path / "a.tar",
        {
            "x/0.jpg": _jpeg(),
            "x/0.txt": b"from text",
            "x/0.json": meta,
            "x/1.json": meta,
            "x/1.jpg": _jpeg(),
        },
    )
    dataset = open_file(tmp_path, "captions", "a.tar")
    assert [dataset.sample(index).messages[1].text for index in range(2)] == ["from text", "from json"]
    named = open_file(tmp_path, "captions", "a.tar", text_column="caption")
    assert named.sample(0).messages[1].text == "from json"
    assert (dataset.sample(1).origin.line, dataset.sample(1).origin.id) == (2, "x/1")
    assert decode(dataset.sample(0).images[0]).size == (4, 3)


def test_a_sample_of_a_tar_holds_no_picture_bytes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": _jpeg(), "0.txt": b"A dog.", "1.jpg": b"no picture", "1.txt": b"A cat."})
    dataset = open_file(tmp_path, "captions", "a.tar")
    (image,), (broken,) = dataset.sample(0).images, dataset.sample(1).images
    assert (image.data, image.path, image.size) == (None, str(tmp_path / "a.tar"), len(_jpeg()))
    assert read_encoded(image) == _jpeg()
    assert len(pickle.dumps(dataset.sample(0))) < 1000
    assert image == dataset.sample(0).images[0]
    assert image.identity != broken.identity, "two pictures of one tar"
    assert read_size(image) == decode(image).size == (4, 3)
    with pytest.raises(DataError, match=r"`1.jpg` is not a picture"):
        decode(broken)


def test_picture_bytes_from_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [{"bytes": _jpeg(), "path": None}], "caption": ["A dog."]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    dataset = open_file(tmp_path, "captions", "rows.parquet")
    sample = dataset.sample(0)
    assert decode(sample.images[0]).size == (4, 3)
    assert (sample.images[0].data, sample.images[0].cell) == (None, (0, "image", "bytes"))
    assert sample.images[0] == dataset.sample(0).images[0], "read twice, it is the same picture"
    assert sample.messages[1].text == "A dog."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "1.jpg", "caption": " "}, "the caption is empty"),
        ({"image": "1.jpg", "caption": 3}, "the caption is 3"),
        ({"image": "1.jpg"}, "no caption under a known name; it has `image`"),
        ({"caption": "A dog."}, "no picture under a known name"),
        ({"image": "", "caption": "A dog."}, "the picture in `image` is empty"),
        ({"image": "2.jpg", "caption": "A dog."}, "`2.jpg` is not a file"),
    ],
)
def test_a_faulty_row_is_refused(tmp_path: Path, row: dict[str, object], said: str) -> None:
    picture(tmp_path, "1.jpg")
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path, "captions", row)
    assert all((item.file, item.line) == ("rows.jsonl", 1) and item.remedy for item in caught.value.problems)


def test_a_column_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    with pytest.raises(DataError, match="did you mean `caption`"):
        read(tmp_path, "captions", {"image": "1.jpg", "caption": "A"}, text_column="captoin")
