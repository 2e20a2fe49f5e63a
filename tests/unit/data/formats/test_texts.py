"""the_cauldron and FineVision rows, from Parquet and from a saved data set."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tests.unit.data.formats.reading import open_file, read, shape
from triptych.core.errors import DataError
from triptych.data.images import decode


def _png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(stream, "PNG")
    return stream.getvalue()


def _dataset() -> datasets.Dataset:
    texts = [
        {"user": "Which?", "assistant": "Red.", "source": "x"},
        {"user": "Sure?", "assistant": "Yes.", "source": "x"},
    ]
    pictures = [{"bytes": _png("red"), "path": None}, {"bytes": _png("blue"), "path": "b.png"}]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({name: datasets.Value("string") for name in ("user", "assistant", "source")}),
        }
    )
    rows = {"images": [pictures, []], "texts": [texts, texts[:1]]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["parquet", "folder", "split"])
def test_rows_with_picture_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data"
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        _dataset().to_parquet(str(path))
    elif kind == "folder":
        _dataset().save_to_disk(str(path))
    else:
        datasets.DatasetDict({"train": _dataset()}).save_to_disk(str(path))
    dataset = open_file(tmp_path, "texts", path.name)
    sample = dataset.sample(0)
    assert shape(sample.messages) == [
        ("user", ["[bytes]", "[bytes]", "Which?"]),
        ("assistant", ["Red."]),
        ("user", ["Sure?"]),
        ("assistant", ["Yes."]),
    ]
    assert [decode(image).getpixel((0, 0)) for image in sample.images] == [(255, 0, 0), (0, 0, 255)]
    assert shape(dataset.sample(1).messages)[0] == ("user", ["Which?"])
    assert (dataset.origin(1).file, dataset.origin(1).line) == (path.name, 2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "`texts` is not a list"),
        ({"texts": []}, "`texts` is not a list"),
        ({"texts": [{"user": "Q"}]}, "`assistant` is missing"),
        ({"texts": [{"user": "Q", "assistant": ""}]}, "empty answer"),
    ],
)
def test_a_faulty_row_is_refused(tmp_path: Path, row: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, "texts", row)
