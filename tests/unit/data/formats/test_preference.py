"""Preference pairs in the layouts of TRL, LLaMA-Factory, ms-swift, 2U1, oumi, RLHF-V and RLAIF-V."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.formats.reading import picture, read, shape
from triptych.core.errors import DataError
from triptych.core.types import Pair

_Q = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
_GOOD, _BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]


@pytest.mark.requirement("H-5")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": _Q, "chosen": _GOOD, "rejected": _BAD, "images": ["1.jpg"]}, id="trl conversational"),
        pytest.param({"chosen": _Q + _GOOD, "rejected": _Q + _BAD, "images": ["1.jpg"]}, id="trl implicit prompt"),
        pytest.param({"prompt": "Q", "chosen": "good", "rejected": "bad", "images": ["1.jpg"]}, id="trl plain"),
        pytest.param(
            {"prompt": "Q", "chosen": _Q + _GOOD, "rejected": _Q + _BAD, "image": "1.jpg"}, id="trl repeated prompt"
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "<image>Q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
                "images": ["1.jpg"],
            },
            id="llamafactory ranking",
        ),
        pytest.param(
            {
                "messages": [{"role": "user", "content": "<image>Q"}, *_GOOD],
                "rejected_response": "bad",
                "images": ["1.jpg"],
            },
            id="swift rejected_response",
        ),
        pytest.param(
            {"query": "<image>Q", "response": "good", "rejected_response": "bad", "images": ["1.jpg"]},
            id="swift query",
        ),
        pytest.param(
            {"messages": _Q + _GOOD, "rejected_messages": _Q + _BAD, "images": ["1.jpg"]}, id="swift messages"
        ),
        pytest.param(
            {"chosen_messages": _Q + _GOOD, "rejected_messages": _Q + _BAD, "images": ["1.jpg"]}, id="llamafactory v1"
        ),
        pytest.param(
            {"id": "1", "image": "1.jpg", "prompt": "<image>Q", "chosen": "good", "rejected": "bad"}, id="2U1"
        ),
        pytest.param({"prompt": "Q", "images": ["1.jpg"], "chosen": _GOOD, "rejected": _BAD}, id="oumi"),
        pytest.param(
            {"image": "1.jpg", "text": json.dumps({"question": "Q", "chosen": "good", "rejected": "bad"}), "idx": 5},
            id="RLHF-V",
        ),
        pytest.param({"image": {"path": "1.jpg"}, "question": "Q", "chosen": "good", "rejected": "bad"}, id="RLAIF-V"),
    ],
)
def test_every_layout_gives_the_same_sample(tmp_path: Path, row: dict[str, Any]) -> None:
    picture(tmp_path, "1.jpg")
    sample = read(tmp_path, "preference", row)
    assert shape(sample.messages) == [("user", ["[1.jpg]", "Q"])]
    assert sample.preference is not None
    assert [shape(answer) for answer in sample.preference.answers] == [
        [("assistant", ["good"])],
        [("assistant", ["bad"])],
    ]
    assert sample.preference.pairs == (Pair(winner=0, loser=1),)
    assert len(sample.images) == 1


@pytest.mark.requirement("H-5")
def test_prompt_of_several_turns_with_system(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Q1"},
        {"from": "gpt", "value": "A1"},
        {"from": "human", "value": "Q2"},
    ]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}}
    sample = read(tmp_path, "preference", row)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user"]


def test_several_rejected_answers_make_several_pairs(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, *_GOOD], "rejected_response": ["bad", "worse"]}
    sample = read(tmp_path, "preference", row)
    assert sample.preference is not None
    assert sample.preference.pairs == (Pair(0, 1), Pair(0, 2))


def test_whole_conversations_share_their_beginning_only(tmp_path: Path) -> None:
    def talk(answer: str) -> list[dict[str, str]]:
        first = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "same"}]
        return [*first, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": answer}]

    sample = read(tmp_path, "preference", {"chosen": talk("x"), "rejected": talk("y")})
    assert [message.text for message in sample.messages] == ["Q1", "same", "Q2"]


_PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**_PAIR, "rejected": "good "}, "the same: `good`"),
        ({"chosen": _Q + _GOOD, "rejected": _Q + _GOOD, "image": "1.jpg"}, "the same: `good`"),
        ({**_PAIR, "rejected": ""}, "turn 1 of the rejected answer is an empty answer"),
        ({**_PAIR, "chosen": 3}, "`chosen` is not a list of turns"),
        ({**_PAIR, "chosen": "see <image>"}, "1 placeholder .* for 0 pictures"),
        ({**_PAIR, "prompt": ""}, "turn 1 of the prompt from `user` is empty"),
        ({**_PAIR, "prompt": "<image><image>Q", "image": "1.jpg"}, "2 placeholders"),
        ({**_PAIR, "images": ["https://picsum.photos/200/300"]}, "remote URL"),
        ({**_PAIR, "rejected_images": ["1.jpg"]}, "different prompts"),
        ({"prompt": _Q + _GOOD, "chosen": "a", "rejected": "b", "image": "1.jpg"}, "prompt ends with a turn"),
        ({"prompt": "Q", "chosen": "good"}, "not a preference pair"),
        (
            {"prompt": "Another", "chosen": _Q + _GOOD, "rejected": _Q + _BAD, "image": "1.jpg"},
            "`prompt` is not what `chosen` and `rejected` begin with",
        ),
        ({"prompt": "Q", "completion": "good", "label": True}, "not a preference pair"),
        ({"text": "plain"}, "`text` is not a JSON object"),
        (
            {"conversations": [{"from": "human", "value": "Q"}], "chosen": "a", "rejected": "b", "image": "1.jpg"},
            "no pl",
        ),
    ],
)
def test_a_faulty_pair_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    picture(tmp_path, "1.jpg")
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path, "preference", row)
    assert all((item.file, item.line) == ("rows.jsonl", 1) and item.remedy for item in caught.value.problems)
