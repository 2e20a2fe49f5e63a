"""Short ways to write the records that data tests need."""

from __future__ import annotations

from triptych.core.types import ImageReference, Message, Origin, Pair, Preference, Role, Sample, Text

PICTURE = ImageReference(path="/pictures/a.png", name="a.png")
OTHER = ImageReference(path="/pictures/b.png", name="b.png")
ORIGIN = Origin("data.jsonl", 7, "row-7")


def say(role: Role, *parts: str | ImageReference, weight: float = 1.0) -> Message:
    """A message of texts and pictures."""
    return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts), weight)


def conversation(*messages: Message, weight: float = 1.0) -> Sample:
    """A sample of these turns."""
    return Sample(messages, ORIGIN, weight=weight)


def preference(prompt: tuple[Message, ...], winner: str, loser: str) -> Sample:
    """A pair of answers to a prompt."""
    answers = ((say("assistant", winner),), (say("assistant", loser),))
    return Sample(prompt, ORIGIN, preference=Preference(answers, (Pair(0, 1),)))
