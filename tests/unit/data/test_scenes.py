"""The embedded data set is exact, repeatable and split."""

import csv
import json
import random
from pathlib import Path

from PIL import Image

from triptych.data.scenes import NAMES, Glyph, draw, glyph, random_scene, write_names


def test_every_name_has_a_glyph_of_the_asked_size() -> None:
    for name in NAMES:
        picture = glyph(name, 48)
        assert max(picture.size) == 48
        assert picture.getbbox() is not None


def test_a_glyph_changes_pixels_only_inside_its_square() -> None:
    background = (250, 250, 250)
    scene = draw([Glyph("dog", 40, 50, 10)], background)
    outside = scene.copy()
    outside.paste(background, (50, 10, 90, 50))
    assert set(outside.get_flattened_data()) == {background}
    assert len(set(scene.get_flattened_data())) > 5


def test_scenes_are_a_pure_function_of_the_generator() -> None:
    first, second = (random_scene("cat", random.Random(3)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert random_scene("cat", random.Random(4)).tobytes() != first.tobytes()


def test_written_files_agree_and_splits_are_disjoint(tmp_path: Path) -> None:
    write_names(tmp_path, train=2, test=1)
    train, test = (json.loads((tmp_path / f"{split}.json").read_text()) for split in ("train", "test"))
    assert (len(train), len(test)) == (2 * len(NAMES), len(NAMES))
    pictures = [Image.open(tmp_path / "pictures" / row["image"]).tobytes() for row in (*train, *test)]
    assert len(set(pictures)) == 3 * len(NAMES)
    with (tmp_path / "train.csv").open(encoding="utf-8", newline="") as stream:
        captions = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["filepath"] for row in captions] == [row["image"] for row in train]
    assert captions[0]["title"] == f"a picture of a {train[0]['conversations'][1]['value']}"
