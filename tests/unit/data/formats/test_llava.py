"""LLaVA rows: the pictures, placeholders, roles and order that requirements A-1 to A-5 name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.data.formats.reading import open_file, open_rows, picture, read, shape
from triptych.core.errors import DataError


def _row(*values: str, **keys: object) -> dict[str, object]:
    roles = ("human", "gpt")
    turns = [{"from": roles[index % 2], "value": value} for index, value in enumerate(values)]
    return {"conversations": turns, **keys}


@pytest.mark.requirement("A-1")
def test_two_rounds_about_one_picture(tmp_path: Path) -> None:
    picture(tmp_path, "a/1.jpg")
    row = _row("<image>\nWhat is it?", "A dog.", "Which colour?", "Brown.", id="7", image="a/1.jpg")
    sample = read(tmp_path, "llava", row)
    assert shape(sample.messages) == [
        ("user", ["[1.jpg]", "\nWhat is it?"]),
        ("assistant", ["A dog."]),
        ("user", ["Which colour?"]),
        ("assistant", ["Brown."]),
    ]
    assert (sample.origin.file, sample.origin.line, sample.origin.id) == ("rows.jsonl", 1, "7")


@pytest.mark.requirement("A-2")
def test_second_spelling_has_role_assistant_and_no_id(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    turns = [{"from": "user", "value": "<image>Q"}, {"from": "assistant", "value": "A"}]
    dataset = open_rows(tmp_path, "llava", _row("Q", "A"), {"image": "1.jpg", "conversations": turns})
    assert shape(dataset.sample(1).messages) == [("user", ["[1.jpg]", "Q"]), ("assistant", ["A"])]
    assert [dataset.sample(index).origin.id for index in range(2)] == ["rows-1", "rows-2"]


@pytest.mark.requirement("A-3", "A-35")
@pytest.mark.parametrize("key", ["images", "image"])
def test_several_pictures_keep_their_places_and_the_text_between(tmp_path: Path, key: str) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    row = _row("<image> and <image>\n请比较这两张图片的异同。", "A", **{key: ["1.jpg", "2.jpg"]})
    sample = read(tmp_path, "llava", row)
    assert shape(sample.messages)[0] == ("user", ["[1.jpg]", " and ", "[2.jpg]", "\n请比较这两张图片的异同。"])


@pytest.mark.requirement("A-4")
def test_caption_record(tmp_path: Path) -> None:
    picture(tmp_path, "00001.jpg")
    row = _row("<image>\nProvide a brief caption.", "A golden retriever.", image="00001.jpg")
    sample = read(tmp_path, "llava", row, task="caption")
    assert shape(sample.messages)[1] == ("assistant", ["A golden retriever."])
    assert sample.task == "caption"


@pytest.mark.requirement("A-5")
def test_text_only_rows_mix_with_picture_rows(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    with_null, without = _row("Q", "A", image=None), _row("Q", "A")
    dataset = open_rows(tmp_path, "llava", _row("<image>Q", "A", image="1.jpg"), with_null, without)
    assert [len(dataset.sample(index).images) for index in range(3)] == [1, 0, 0]


def test_placeholder_at_the_end(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    sample = read(tmp_path, "llava", _row("How many?\n<image>", "6", image="1.jpg"))
    assert shape(sample.messages)[0] == ("user", ["How many?\n", "[1.jpg]"])


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_system_prompt_beside_the_conversation(tmp_path: Path, key: str) -> None:
    sample = read(tmp_path, "llava", _row("Q", "A", **{key: "Be short."}))
    assert shape(sample.messages)[0] == ("system", ["Be short."])


def test_json_list_and_json_lines_give_the_same_samples(tmp_path: Path) -> None:
    rows = [_row("Q1", "A1"), _row("Q2", "A2", id="x")]
    lines = open_rows(tmp_path, "llava", *rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    listed = open_file(tmp_path, "llava", "rows.json")
    for index in range(2):
        assert listed.sample(index).messages == lines.sample(index).messages
    # `[` is line 1; a row of one question and answer takes 12 lines when indented by two.
    assert listed.sample(0).origin.line == 2
    assert listed.sample(1).origin.line == 14


@pytest.mark.requirement("A-1")
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (_row("<image>Q", "A"), "1 placeholder (<image>) for 0 pictures"),
        (_row("<image><image>Q", "A", image="1.jpg"), "2 placeholders (<image>) for 1 picture"),
        (_row("Q", "A", image="1.jpg"), "no placeholder (<image>) for 1 picture"),
        (_row("<image>Q", "A", image=["1.jpg", "1.jpg"]), "1 placeholder (<image>) for 2 pictures"),
        (_row("Q", ""), "turn 2 of the row is an empty answer"),
        (_row("Q", " \n"), "turn 2 of the row is an empty answer"),
        (_row("", "A"), "turn 1 of the row from `user` is empty"),
        (_row("Q"), "ends with a turn from `user`"),
        (_row("Q", "A", "Q"), "ends with a turn from `user`"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "turn 1 of the row is from `assistant`"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "human", "value": "Q"}]},
            "turn 2 of the row is from `user` where `assistant`",
        ),
        ({"conversations": [{"from": "robot", "value": "Q"}]}, "unknown role `robot`"),
        ({"conversations": [{"value": "Q"}]}, "turn 1 has no role"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no content"),
        ({"conversations": []}, "`conversations` is not a list of turns"),
        ({"conversations": "Q"}, "`conversations` is not a list of turns"),
        ({"conversations": ["Q"]}, "turn 1 is not an object"),
        ({"conversations": [{"from": "human", "value": 3}]}, "content is `3`"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no `conversations`"),
        (_row("Q", "<image>", image="1.jpg"), "an answer with a picture"),
        (_row("<image>Q", "A", image="none.jpg"), "`none.jpg` is not a file"),
        (_row("<image>Q", "A", image="../out.jpg"), "leaves the image root"),
        (_row("<image>Q", "A", image=7), "`7` is not a picture"),
        (_row("<image>Q", "A", image="1.jpg", images=["1.jpg"]), "both `image` and `images`"),
        (_row("<video>Q", "A", video="1.mp4"), "`video`"),
        (["Q"], "row is a list"),
    ],
)
def test_a_faulty_row_is_refused_with_file_line_and_remedy(tmp_path: Path, row: object, said: str) -> None:
    root = tmp_path / "data"
    picture(root, "1.jpg")
    picture(tmp_path, "out.jpg")
    dataset = open_rows(root, "llava", _row("Q", "A"), row)
    with pytest.raises(DataError) as caught:
        dataset.sample(1)
    (problem,) = caught.value.problems
    assert said in problem.message
    assert (problem.file, problem.line) == ("rows.jsonl", 2)
    assert problem.remedy


def test_message_weights_come_from_the_turns(tmp_path: Path) -> None:
    row = _row("Q", "A", "Q", "A")
    row["conversations"][1]["loss"] = False  # type: ignore[index]
    row["conversations"][3]["loss_weight"] = 0.5  # type: ignore[index]
    assert [message.weight for message in read(tmp_path, "llava", row).messages] == [1.0, 0.0, 1.0, 0.5]
