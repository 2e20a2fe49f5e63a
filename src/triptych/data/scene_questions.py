"""Questions about scenes and their exact answers, task by task.

Answers are spread so that guessing gains little: yes as often as no, every number as often as the others, things and
places evenly. Boxes are integers from 0 to 999, relative to the side of the picture, origin top left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from triptych.data.scenes import COUNTS, NAMES, PLACES, SIDE, Item, Scene, article, listed, plural


@dataclass(frozen=True)
class Question:
    """One question about one or two pictures."""

    task: str
    text: str
    answer: str


Ask = Callable[[Scene, random.Random], Question | None]
"""A question about a scene; None where the scene allows none of this kind."""


def describe(scene: Scene) -> str:
    """All things and their numbers in reading order: `a dog and two cats`."""
    return listed([article(name) if n == 1 else f"{COUNTS[n]} {plural(name)}" for name, n in scene.counts.items()])


def describe_places(scene: Scene) -> str:
    """Every thing and its place in reading order: `a dog at the top left and a cat in the center`."""
    return listed([f"{article(item.name)} {at(item.place)}" for item in scene.items])


def at(place: int) -> str:
    """`at the top left`, `in the center`."""
    return f"{'in' if PLACES[place] == 'center' else 'at'} the {PLACES[place]}"


def ask_caption(scene: Scene, generator: random.Random) -> Question | None:
    """A short caption: things and numbers."""
    return Question("caption", "Describe the picture briefly.", f"{describe(scene).capitalize()}.")


def ask_dense_caption(scene: Scene, generator: random.Random) -> Question | None:
    """A caption with places."""
    return Question("dense_caption", "Describe the picture in detail.", f"{describe_places(scene).capitalize()}.")


def ask_naming(scene: Scene, generator: random.Random) -> Question | None:
    """The name of the only thing."""
    if len(scene.items) != 1:
        return None
    return Question("naming", "What is in the picture?", scene.items[0].name)


def ask_counting(scene: Scene, generator: random.Random) -> Question | None:
    """How many things of the scene's target name there are."""
    if not scene.target:
        return None
    return Question("counting", f"How many {plural(scene.target)} are there?", COUNTS[scene.counts[scene.target]])


def ask_presence(scene: Scene, generator: random.Random) -> Question | None:
    """Whether a name is in the picture; yes as often as no."""
    is_there = generator.random() < 0.5
    name = generator.choice([name for name in NAMES if (name in scene.counts) == is_there])
    return Question("presence", f"Is there {article(name)} in the picture?", "yes" if is_there else "no")


def ask_position(scene: Scene, generator: random.Random) -> Question | None:
    """The place of a thing that is alone of its name."""
    if not scene.singles:
        return None
    item = generator.choice(scene.singles)
    return Question("position", f"Where is the {item.name}?", PLACES[item.place])


def ask_lookup(scene: Scene, generator: random.Random) -> Question | None:
    """The name of the thing at a place."""
    item = generator.choice(scene.items)
    return Question("lookup", f"What is {at(item.place)}?", item.name)


def ask_attribute(scene: Scene, generator: random.Random) -> Question | None:
    """The colour of the background."""
    return Question("attribute", "What color is the background?", scene.background)


def ask_text(scene: Scene, generator: random.Random) -> Question | None:
    """The word on the sign."""
    return Question("ocr", "What does the sign say?", scene.word) if scene.word else None


def ask_box(scene: Scene, generator: random.Random) -> Question | None:
    """The box of a thing that is alone of its name."""
    if not scene.singles:
        return None
    item = generator.choice(scene.singles)
    return Question("box", f"Give the box of the {item.name}.", box_text(item))


def ask_referring(scene: Scene, generator: random.Random) -> Question | None:
    """The box of a thing that is meant by its place."""
    item = generator.choice(scene.items)
    return Question("referring", f"Give the box of the thing {at(item.place)}.", box_text(item))


def compare(first: Scene, second: Scene) -> Question | None:
    """Which of two pictures shows more things."""
    if len(first.items) == len(second.items):
        return None
    answer = "the first" if len(first.items) > len(second.items) else "the second"
    return Question("comparison", "Which picture shows more things, the first or the second?", answer)


def box_text(item: Item) -> str:
    """`[left, top, right, bottom]` in thousandths of the side."""
    return str([min(999, round(value * 1000 / SIDE)) for value in item.box])


CORE: dict[str, Ask] = {
    "presence": ask_presence,
    "counting": ask_counting,
    "position": ask_position,
    "naming": ask_naming,
    "caption": ask_caption,
}
"""The tasks a demo model is judged by."""

OTHERS: dict[str, Ask] = {
    "dense_caption": ask_dense_caption,
    "lookup": ask_lookup,
    "attribute": ask_attribute,
    "box": ask_box,
    "referring": ask_referring,
}
"""Further tasks about one scene; `ocr` and `comparison` need scenes of their own."""


GIVEN_AWAY = ("presence", "attribute", "counting", "position", "lookup", "naming", "caption")
"""Tasks of a dialogue, by how much an answer tells about the others."""


def dialogue(scene: Scene, generator: random.Random, turns: int) -> list[Question]:
    """At most `turns` different questions about one scene, drawn at random.

    Those whose answers give away most come last: who answers a later turn sees the earlier ones.
    """
    kinds = [*CORE.values(), ask_presence, ask_position, ask_lookup, ask_attribute]
    generator.shuffle(kinds)
    found: dict[str, Question] = {}
    for ask in kinds:
        question = ask(scene, generator)
        if question is not None and len(found) < turns:
            found.setdefault(question.text, question)
    return sorted(found.values(), key=lambda question: GIVEN_AWAY.index(question.task))


def invent(scene: Scene, generator: random.Random) -> tuple[Question, str, str]:
    """A captioning question with its true answer, a wrong answer, and what is wrong in it.

    The wrong one invents a thing (`object`), a number (`count`) or a place (`place`).
    """
    fault = generator.choice(("object", "count", "place"))
    question = ask_dense_caption(scene, generator) if fault == "place" else ask_caption(scene, generator)
    assert question is not None
    item = generator.choice(scene.items)
    if fault == "object":
        name = generator.choice([name for name in NAMES if name not in scene.counts])
        text = describe(replace(scene, items=(*scene.items, replace(item, name=name))))
    elif fault == "count":
        count = generator.choice([number for number in (1, 2, 3, 4) if number != scene.counts[item.name]])
        kept = tuple(other for other in scene.items if other.name != item.name)
        text = describe(replace(scene, items=(*kept, *([item] * count))))
    else:
        free = [place for place in range(len(PLACES)) if all(place != other.place for other in scene.items)]
        moved = replace(item, place=generator.choice(free))
        text = describe_places(replace(scene, items=tuple(moved if other is item else other for other in scene.items)))
    return question, f"{text.capitalize()}.", fault
