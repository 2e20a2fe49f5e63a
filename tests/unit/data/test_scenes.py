"""Scenes are exact, repeatable, split, and hold some combinations back."""

from collections import Counter
from typing import get_args

import numpy as np
import pytest

from triptych.data.scenes import (
    COUNTS,
    NAMES,
    PLACES,
    SIDE,
    Item,
    Scene,
    Split,
    draw,
    glyph,
    is_held_out_count,
    is_held_out_place,
    listed,
    mask,
    plural,
    sample_scene,
    sample_sign,
)


def test_every_name_has_a_glyph_of_the_asked_size() -> None:
    for name in NAMES:
        picture = glyph(name, 48)
        assert max(picture.size) == 48
        assert picture.getbbox() is not None


def test_a_thing_changes_pixels_only_inside_its_box() -> None:
    empty = Scene((), "blue")
    item = Item("dog", 1, 30, 40, 10)
    changed = (np.asarray(draw(Scene((item,), "blue"))) != np.asarray(draw(empty))).any(axis=-1)
    left, top, right, bottom = item.box
    assert changed[top:bottom, left:right].mean() > 0.3
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_the_mask_is_where_the_picture_changes() -> None:
    item = Item("key", 4, 32, 33, 31)
    changed = (np.asarray(draw(Scene((item,), "pink"))) != np.asarray(draw(Scene((), "pink")))).any(axis=-1)
    inside = np.asarray(mask(item)) == 255
    assert inside.sum() > 100
    assert changed[inside].all()


def test_a_scene_is_a_function_of_seed_split_and_number() -> None:
    assert sample_scene("train", 0, 7) == sample_scene("train", 0, 7)
    others = [sample_scene("train", 1, 7), sample_scene("test", 0, 7), sample_scene("train", 0, 8)]
    assert sample_scene("train", 0, 7) not in others


@pytest.mark.parametrize("split", get_args(Split))
def test_things_stand_apart_in_their_places_inside_the_picture(split: str) -> None:
    for number in range(300):
        scene = sample_scene(split, 0, number)  # type: ignore[arg-type]
        places = [item.place for item in scene.items]
        assert places == sorted(set(places))
        for item in scene.items:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            middle = (top + bottom) // 2 * 3 // SIDE * 3 + (left + right) // 2 * 3 // SIDE
            assert middle == item.place, (item, PLACES[middle])


def test_combinations_are_shown_in_their_own_split_only() -> None:
    for split in ("train", "validation", "test"):
        for number in range(400):
            scene = sample_scene(split, 0, number)  # type: ignore[arg-type]
            assert not any(is_held_out_place(item.name, item.place) for item in scene.items)
            assert not any(is_held_out_count(name, count) for name, count in scene.counts.items())
            sign = sample_sign(split, 0, number)  # type: ignore[arg-type]
            assert not any(is_held_out_place(item.name, item.place) for item in sign.items)
    for number in range(200):
        scene = sample_scene("combinations", 0, number)
        if scene.target:
            assert is_held_out_count(scene.target, scene.counts[scene.target])
        else:
            assert is_held_out_place(scene.items[0].name, scene.items[0].place)


def test_numbers_come_as_often_as_each_other_and_every_place_is_used() -> None:
    scenes = [sample_scene("train", 0, number) for number in range(3000)]
    counts = Counter(scene.counts[scene.target] for scene in scenes if scene.target)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 0.18 * sum(counts.values())
    places = Counter(item.place for scene in scenes for item in scene.items)
    assert len(places) == len(PLACES)
    assert min(places.values()) > 0.8 * max(places.values())


def test_words() -> None:
    assert [plural(name) for name in ("dog", "strawberry", "tomato", "key")] == [
        "dogs",
        "strawberries",
        "tomatoes",
        "keys",
    ]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert COUNTS[3] == "three"
