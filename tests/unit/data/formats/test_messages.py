"""Chat messages of OpenAI, TRL, LLaMA-Factory, ms-swift, Qwen, oumi, xtuner: one meaning, many spellings."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.data.formats.reading import open_rows, picture, read, shape
from triptych.core.errors import DataError
from triptych.data.images import decode


def _data_url() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), "blue").save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _chat(content: Any, answer: Any = "A", **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **keys}


@pytest.mark.requirement("A-6")
def test_openai_messages_with_system(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "You are a legal assistant."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    sample = read(tmp_path, "messages", {"messages": turns})
    assert shape(sample.messages) == [
        ("system", ["You are a legal assistant."]),
        ("user", ["Q"]),
        ("assistant", ["A"]),
    ]


@pytest.mark.requirement("A-6")
def test_messages_and_conversations_mean_the_same(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert (
        read(tmp_path, "messages", {"conversations": turns}).messages == read(tmp_path, "messages", _chat("Q")).messages
    )


def test_llamafactory_puts_a_second_picture_into_a_later_turn(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    row = _chat("<image>Who?", images=["1.jpg", "2.jpg"])
    row["messages"] += [{"role": "user", "content": "And here?<image>"}, {"role": "assistant", "content": "B"}]
    sample = read(tmp_path, "messages", row)
    assert shape(sample.messages)[0] == ("user", ["[1.jpg]", "Who?"])
    assert shape(sample.messages)[2] == ("user", ["And here?", "[2.jpg]"])


@pytest.mark.requirement("A-9")
@pytest.mark.parametrize(
    "text",
    [
        "<image>, <image>: compare",
        "<image1>, <image2>: compare",
        "<image_1>, <image_2>: compare",
        "<image id='img1'>, <image id='img2'>: compare",
    ],
)
def test_every_spelling_of_a_placeholder_becomes_a_part_in_its_place(tmp_path: Path, text: str) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    sample = read(tmp_path, "messages", _chat(text, images=["1.jpg", "2.jpg"]))
    assert shape(sample.messages)[0] == ("user", ["[1.jpg]", ", ", "[2.jpg]", ": compare"])


@pytest.mark.requirement("A-9")
def test_numbers_choose_the_picture(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    sample = read(tmp_path, "messages", _chat("<image_2> or <image_1>?", images=["1.jpg", "2.jpg"]))
    assert shape(sample.messages)[0] == ("user", ["[2.jpg]", " or ", "[1.jpg]", "?"])


@pytest.mark.requirement("A-9")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<image1> <image>", "mixed"),
        ("<image0> <image1>", "number 2 pictures 1 to 2"),
        ("<image1> <image1>", "number 2 pictures 1 to 2"),
        ("<image1> <image3>", "number 2 pictures 1 to 2"),
        ("<image id='a'> <image id='a'>", "stands 2 times"),
    ],
)
def test_placeholders_that_cannot_be_matched_are_refused(tmp_path: Path, text: str, said: str) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(DataError, match=said):
        read(tmp_path, "messages", _chat(text, images=["1.jpg", "2.jpg"]))


_TEXT = {"type": "text", "text": "Q"}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(_chat([{"type": "image_url", "image_url": {"url": "1.jpg"}}, _TEXT]), id="openai"),
        pytest.param(_chat([{"type": "image_url", "image_url": "1.jpg"}, _TEXT]), id="openai, bare string"),
        pytest.param(_chat([{"type": "image"}, _TEXT], images=["1.jpg"]), id="trl"),
        pytest.param(_chat([{"type": "image"}, _TEXT], image="1.jpg"), id="trl, one image"),
        pytest.param(_chat([{"type": "image", "text": None}, {**_TEXT, "image": None}], images=["1.jpg"]), id="arrow"),
        pytest.param(_chat([{"type": "image", "path": "1.jpg"}, _TEXT]), id="transformers path"),
        pytest.param(_chat([{"type": "image", "url": "1.jpg"}, _TEXT]), id="transformers url"),
        pytest.param(_chat([{"type": "image", "image": "1.jpg"}, _TEXT]), id="qwen"),
        pytest.param(
            _chat([{"type": "image_url", "value": "1.jpg"}, {"type": "text", "value": "Q"}]), id="llamafactory v1"
        ),
        pytest.param(_chat([{"type": "image_url", "content": "1.jpg"}, {"type": "text", "content": "Q"}]), id="oumi"),
        pytest.param(
            _chat(
                [
                    {"type": "image_url", "image_url": {"url": "1.jpg", "image_wh": [4, 3]}},
                    {"type": "text", "text": "<IMG_CONTEXT>Q"},
                ]
            ),
            id="xtuner old",
        ),
        pytest.param(_chat([{"type": "image", "image": {"url": "1.jpg", "image_wh": [4, 3]}}, _TEXT]), id="xtuner new"),
        pytest.param(_chat("<image>Q", images=[{"path": "1.jpg"}]), id="swift image object"),
        pytest.param(_chat("<img>1.jpg</img>Q"), id="swift inline"),
        pytest.param({"query": "<image>Q", "response": "A", "images": ["1.jpg"]}, id="swift query"),
        pytest.param({"query": "<img>1.jpg</img>Q", "response": "A"}, id="swift query inline"),
        pytest.param(
            {"conversation": [{"human": "<image>Q", "assistant": "A"}], "images": ["1.jpg"]}, id="swift rounds"
        ),
    ],
)
def test_every_dialect_of_a_picture_part(tmp_path: Path, row: dict[str, Any]) -> None:
    picture(tmp_path, "1.jpg")
    assert shape(read(tmp_path, "messages", row).messages) == [("user", ["[1.jpg]", "Q"]), ("assistant", ["A"])]


def test_xtuner_markers_give_the_places(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg", "2.jpg")
    content = [
        {"type": "image_url", "image_url": {"url": "1.jpg"}},
        {"type": "image_url", "image_url": {"url": "2.jpg"}},
        {"type": "text", "text": "Is <IMG_CONTEXT> like <IMG_CONTEXT>?"},
    ]
    sample = read(tmp_path, "messages", _chat(content))
    assert shape(sample.messages)[0] == ("user", ["Is ", "[1.jpg]", " like ", "[2.jpg]", "?"])


def test_a_picture_part_stays_where_it_is_when_the_text_mentions_a_placeholder(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    content = [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "use the <image> tag"}]
    with pytest.raises(DataError, match=r"1 placeholder \(<image>\) for 0 pictures"):
        read(tmp_path, "messages", _chat(content))


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"content": None, "tool_calls": [{"name": "f"}]}, "turn 2 has calls of tools"),
        ({"content": "A", "tool_calls": [{"name": "f"}]}, "turn 2 has calls of tools"),
        ({"content": "A", "reasoning_content": "B"}, "turn 2 has reasoning apart from the answer"),
        ({"content": "A", "images": ["1.jpg"]}, r"turn 2 has pictures of its own(.|\n)*move its pictures"),
        ({"content": "a <img>1.jpg</img> b"}, "turn 2 of the row is an answer with a picture in it"),
        ({"content": "a <video> b"}, "placeholder `<video>`"),
        ({"content": [{"type": "text", "text": "<audio>"}]}, "placeholder `<audio>`"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path: Path, turn: dict[str, Any], said: str) -> None:
    picture(tmp_path, "1.jpg")
    with pytest.raises(DataError, match=said):
        read(tmp_path, "messages", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", **turn}]})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"label": False}, r"whether its answer is wanted \(`label: false`\)"),
        ({"label": True}, "whether its answer is wanted"),
        ({"rejected_response": "B"}, r"an answer to compare with \(`rejected_response`\)(.|\n)*format: preference"),
        ({"system": "S", "system_prompt": "T"}, "`system` and `system_prompt` differ"),
    ],
)
def test_keys_that_would_change_the_training_are_not_ignored(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, "messages", _chat("Q", **keys))


@pytest.mark.parametrize("format", ["messages", "llava"])
def test_a_system_prompt_beside_the_turns_is_read_in_every_format(tmp_path: Path, format: str) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for keys in ({"system": "S"}, {"system_prompt": "S"}, {"system": "S", "system_prompt": "S"}):
        sample = read(tmp_path, format, {"conversations": turns, "label": 3, **keys})
        assert shape(sample.messages)[0] == ("system", ["S"])


@pytest.mark.parametrize(
    "content", ["<img>1.jpg</img>Q", [{"type": "text", "text": "<img>1.jpg</img>Q"}], ["<img>1.jpg</img>Q"]]
)
def test_a_path_in_the_text_is_a_picture_in_every_format(tmp_path: Path, content: Any) -> None:
    picture(tmp_path, "1.jpg")
    answer = {"role": "assistant", "content": "A"}
    question = {"role": "user", "content": content}
    rows = {
        "messages": {"messages": [question, answer]},
        "llava": {"conversations": [question, answer]},
        "preference": {"prompt": [question], "chosen": [answer], "rejected": [{**answer, "content": "B"}]},
    }
    for format, row in rows.items():
        assert shape(read(tmp_path, format, row).messages)[0] == ("user", ["[1.jpg]", "Q"])


def test_xtuner_pretrain_role_is_a_caption_pair(tmp_path: Path) -> None:
    picture(tmp_path, "1.jpg")
    content = [
        {"type": "image_url", "image_url": {"url": "1.jpg"}},
        {"type": "text", "text": "<IMG_CONTEXT>\nA dog."},
    ]
    sample = read(tmp_path, "messages", {"messages": [{"role": "pretrain", "content": content}]})
    assert shape(sample.messages) == [("user", ["[1.jpg]"]), ("assistant", ["A dog."])]


def test_data_urls_carry_their_bytes(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": _data_url()}}, _TEXT]
    (image,) = read(tmp_path, "messages", _chat(content)).images
    assert decode(image).getpixel((0, 0)) == (0, 0, 255)


def test_swift_system_query_response_history(tmp_path: Path) -> None:
    row = {"system": "S", "query": "Q2", "response": "A2", "history": [["Q1", "A1"]]}
    assert shape(read(tmp_path, "messages", row).messages) == [
        ("system", ["S"]),
        ("user", ["Q1"]),
        ("assistant", ["A1"]),
        ("user", ["Q2"]),
        ("assistant", ["A2"]),
    ]


def test_an_empty_system_turn_is_no_turn(tmp_path: Path) -> None:
    row = _chat("Q")
    row["messages"].insert(0, {"role": "system", "content": ""})
    assert shape(read(tmp_path, "messages", row).messages)[0] == ("user", ["Q"])


@pytest.mark.requirement("A-37")
def test_task_tag_of_the_row_wins_over_that_of_the_data_set(tmp_path: Path) -> None:
    dataset = open_rows(
        tmp_path, "messages", _chat("Q"), _chat("Q", task="ocr"), _chat("Q", channel="counting"), task="vqa"
    )
    assert [dataset.sample(index).task for index in range(3)] == ["vqa", "ocr", "counting"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (_chat([{"type": "image_url", "image_url": {"url": "https://a.b/c.jpg"}}, _TEXT]), "remote URL"),
        (_chat("<img>http://a.b/c.jpg</img>Q"), "remote URL"),
        (_chat([{"type": "video", "video": "1.mp4"}, _TEXT]), "type `video` is not supported"),
        (_chat([{"type": "text"}]), "no text"),
        (_chat([3]), "a content part is `3`"),
        (_chat([{"type": "image"}, _TEXT]), "1 placeholder .* for 0 pictures"),
        (_chat([{"type": "image", "path": "1.jpg"}, {"type": "text", "text": "<image><image>Q"}]), "2 placeholders"),
        ({"text": "Q"}, "no `messages`; it has `text`"),
        ({}, "no `messages`; it has no keys"),
        ({"query": "Q"}, "`response` is missing"),
        ({"query": "Q", "response": "A", "history": ["Q1"]}, "`history` is not a list"),
        (_chat("Q", tools='[{"name": "f"}]'), "tool descriptions"),
        (_chat("<bbox>", objects={"bbox": [[1, 2, 3, 4]]}), "boxes"),
        (_chat("Q", system="S1") | {"messages": [{"role": "system", "content": "S2"}]}, "turn 2 of the row"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role `tool`"),
        ({"messages": [{"role": "system", "content": [{"type": "image", "path": "1.jpg"}]}]}, "system turn"),
        ({"messages": [{"role": "user", "content": "Q", "loss": True}]}, "only answers are supervised"),
        ({"messages": [{"role": "assistant", "content": "Q", "loss": "yes"}]}, "`loss: yes`"),
        ({"messages": [{"role": "pretrain", "content": "text alone"}]}, "`pretrain`"),
    ],
)
def test_a_faulty_row_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    picture(tmp_path, "1.jpg")
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path, "messages", row)
    assert all((item.file, item.line) == ("rows.jsonl", 1) and item.remedy for item in caught.value.problems)
