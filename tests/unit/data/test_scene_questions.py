"""Every answer is true of its scene, and guessing gains little."""

import random
import re
from collections import Counter

import pytest

from triptych.data import scene_questions as questions
from triptych.data.scenes import NAMES, PLACES, SIDE, Item, Scene, sample_scene, sample_sign
from triptych.evaluation.metrics import objects_of

DOG, CAT, OTHER_CAT = Item("dog", 0, 30, 1, 2), Item("cat", 4, 30, 33, 34), Item("cat", 8, 30, 65, 66)
SCENE = Scene((DOG, CAT, OTHER_CAT), "green", target="cat")


def answer(ask: questions.Ask, scene: Scene = SCENE, seed: int = 0) -> str:
    found = ask(scene, random.Random(seed))
    assert found is not None
    return found.answer


def test_answers_about_a_scene_known_by_hand() -> None:
    assert answer(questions.ask_caption) == "A dog and two cats."
    dense = "A dog at the top left, a cat in the center and a cat at the bottom right."
    assert answer(questions.ask_dense_caption) == dense
    assert answer(questions.ask_counting) == "two"
    assert answer(questions.ask_position) == "top left"
    assert answer(questions.ask_attribute) == "green"
    assert questions.ask_naming(SCENE, random.Random(0)) is None
    assert answer(questions.ask_naming, Scene((CAT,), "pink")) == "cat"
    compared = questions.compare(SCENE, Scene((DOG,), "pink"))
    assert compared is not None and compared.answer == "the first"
    assert questions.compare(SCENE, SCENE) is None
    assert answer(questions.ask_text, sample_sign("test", 0, 3)) == sample_sign("test", 0, 3).word


def test_boxes_are_thousandths_of_the_side() -> None:
    left, top, right, bottom = DOG.box
    assert questions.box_text(DOG) == str([round(value * 1000 / SIDE) for value in (left, top, right, bottom)])
    found = questions.ask_referring(Scene((DOG,), "pink"), random.Random(0))
    assert found is not None and found.text.endswith("the thing at the top left.")


@pytest.mark.parametrize("seed", range(40))
def test_presence_is_true(seed: int) -> None:
    found = questions.ask_presence(SCENE, random.Random(seed))
    assert found is not None
    name = found.text.removeprefix("Is there a").removeprefix("n").split()[0]
    assert name in NAMES
    assert (found.answer == "yes") == (name in SCENE.counts)


def test_the_most_frequent_answer_is_no_good_guess() -> None:
    scenes = [sample_scene("train", 0, number) for number in range(2000)]
    shares = {}
    for task, ask in questions.CORE.items():
        found = [question for number, scene in enumerate(scenes) if (question := ask(scene, random.Random(number)))]
        counts = Counter(question.answer for question in found)
        shares[task] = max(counts.values()) / len(found)
    assert shares["presence"] < 0.54
    assert shares["counting"] < 0.32
    assert shares["position"] < 2 / len(PLACES)
    assert shares["naming"] < 2.5 / len(NAMES)
    assert shares["caption"] < 0.1


def test_a_dialogue_asks_different_questions() -> None:
    for number in range(100):
        asked = questions.dialogue(sample_scene("train", 0, number), random.Random(number), 6)
        assert 4 <= len(asked) <= 6
        assert len({question.text for question in asked}) == len(asked)
        order = [questions.GIVEN_AWAY.index(question.task) for question in asked]
        assert order == sorted(order)


def test_an_invented_answer_is_wrong_in_what_it_says() -> None:
    seen = set()
    for number in range(200):
        scene = sample_scene("train", 0, number)
        question, wrong, fault = questions.invent(scene, random.Random(number))
        seen.add(fault)
        if fault == "place":  # the same things, one of them elsewhere
            said, true = (set(re.split(r", | and ", text.lower().rstrip("."))) for text in (wrong, question.answer))
            assert len(said - true) == len(true - said) == 1
            (moved,), (item,) = said - true, true - said
            assert moved.split()[:2] == item.split()[:2] and moved != item
            continue
        said, true = objects_of(wrong), objects_of(question.answer)
        assert true == scene.counts
        if fault == "object":
            (name,) = said.keys() - true.keys()
            assert name in NAMES and said - true == {name: 1} and not true - said
        else:
            (name,) = (name for name in NAMES if said[name] != true[name])
            assert said[name] > 0 and said.keys() == true.keys()
    assert seen == {"object", "count", "place"}
