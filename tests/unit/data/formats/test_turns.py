"""Roles, order and emptiness of turns."""

from __future__ import annotations

import pytest

from triptych.core.errors import DataError
from triptych.core.types import ImageReference, Message, Role, Text
from triptych.data.formats.turns import check_conversation


def _talk(roles: str) -> list[Message]:
    names: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(names[letter], (Text("x"),)) for letter in roles]


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua"])
def test_conversations_that_alternate_are_accepted(roles: str) -> None:
    check_conversation(_talk(roles))


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("", "ends with no turn"),
        ("s", "ends with no turn"),
        ("u", "ends with a turn from `user`"),
        ("a", "turn 1 of the row is from `assistant` where `user`"),
        ("usa", "turn 2 of the row is from `system` where `assistant`"),
        ("ssua", "turn 2 of the row is from `system` where `user`"),
        ("uaa", "turn 3 of the row is from `assistant` where `user`"),
    ],
)
def test_every_other_order_is_refused(roles: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_conversation(_talk(roles))


def test_answers_start_with_the_assistant() -> None:
    check_conversation(_talk("a"), starts_with="assistant", what="chosen answer")
    with pytest.raises(DataError, match="turn 1 of the chosen answer is from `user`"):
        check_conversation(_talk("ua"), starts_with="assistant", what="chosen answer")


def test_a_picture_alone_is_a_question() -> None:
    check_conversation([Message("user", (ImageReference(data=b"x"),)), *_talk("a")])
