"""The table of formats: configuration, opening, and that no row whatever raises anything but a DataError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.data.formats.reading import ADAPTER, open_file, open_rows, picture
from triptych.core.errors import DataError
from triptych.core.types import Origin, Sample
from triptych.data.formats import FORMATS, LlavaConfig, open_dataset
from triptych.data.formats.base import RowContext


def test_configuration_is_told_apart_by_format() -> None:
    config = ADAPTER.validate_python({"format": "llava", "path": "a.json", "weight": 0.7, "task": "vqa"})
    assert isinstance(config, LlavaConfig)
    assert (config.weight, config.task, config.images) == (0.7, "vqa", None)
    assert {ADAPTER.validate_python({"format": name, "path": "a"}).format for name in FORMATS} == set(FORMATS)


@pytest.mark.parametrize("change", [{"format": "llave"}, {"weight": 0}, {"weight": float("nan")}, {"pathh": "x"}])
def test_wrong_configuration_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"format": "llava", "path": "a.json", **change})


def test_paths_are_relative_to_the_base_and_pictures_to_the_root(tmp_path: Path) -> None:
    picture(tmp_path, "pictures/1.jpg", "rows/2.jpg")
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "rows" / f"{name}.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
    given = open_file(tmp_path, "llava", "rows/1.jpg.json", images="pictures")
    default = open_file(tmp_path, "llava", "rows/2.jpg.json")
    assert given.sample(0).images[0].path == str((tmp_path / "pictures/1.jpg").resolve())
    assert default.sample(0).images[0].path == str((tmp_path / "rows/2.jpg").resolve())


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match=r"trian.json: data file not found\n.*did you mean `train.json`"):
        open_file(tmp_path, "llava", "trian.json")


def test_a_missing_image_root_is_said_once_at_opening(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"image root none of rows.jsonl is not a folder"):
        open_dataset(LlavaConfig(format="llava", path="rows.jsonl", images="none"), tmp_path)


def test_a_broken_line_breaks_its_own_sample_only(tmp_path: Path) -> None:
    good = '{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}\n'
    (tmp_path / "rows.jsonl").write_text(good + '{"conversations": [\n' + good)
    dataset = open_file(tmp_path, "llava", "rows.jsonl")
    assert dataset.sample(0).messages == dataset.sample(2).messages
    with pytest.raises(DataError, match=r"rows.jsonl:2: row is not valid JSON at line 2, column 20"):
        dataset.sample(1)


def test_a_sample_outside_the_data_set_is_an_index_error(tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, "llava", {})
    for index in (-1, 1):
        with pytest.raises(IndexError):
            dataset.sample(index)


_NAMES = ("messages", "conversations", "image", "images", "prompt", "chosen", "rejected", "texts", "caption", "query")
_INNER = ("role", "from", "content", "value", "type", "text", "image", "image_url", "user", "assistant", "loss", "path")
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(
        (
            "",
            "user",
            "assistant",
            "human",
            "gpt",
            "system",
            "text",
            "image",
            "<image>",
            "<image2>",
            "hello",
            "../x",
            "\0",
        )
    )
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_INNER), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5))
def test_any_row_is_a_sample_or_a_data_error(tmp_path: Path, name: str, row: dict[str, object]) -> None:
    config = ADAPTER.validate_python({"format": name, "path": "rows.jsonl"})
    try:
        samples = FORMATS[name].read(row, config, RowContext(tmp_path, Origin("rows.jsonl", 1, "1"), ""))
    except DataError as error:
        assert all(problem.message and problem.remedy for problem in error.problems)
    else:
        assert samples
        assert all(isinstance(sample, Sample) for sample in samples)
