"""What Hugging Face's Pillow image processors compute, without the detours: the same numbers in a fraction of the time.

Theirs turns a picture into an array, that into a picture again to resize it, and then rescales and normalises every
value in float64. Here the picture is resized as it is, and each of the 256 levels a value can have is rescaled and
normalised once, by the processor's own functions; the rest is a look-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend

from triptych.core.protocols import join_pixels

Size = tuple[int, int]
"""(width, height) in pixels."""
Preparation = Callable[[Image.Image, Size], dict[str, Tensor]]
"""(RGB picture, the size it had before it was reduced) -> vision inputs of this picture alone."""

PROBES: tuple[Size, ...] = ((61, 43), (37, 80))
"""Sizes of the pictures that both ways are compared on."""


class PictureValues:
    """Resizes and normalises pictures with the settings of an image processor."""

    def __init__(self, image_processor: PilBackend) -> None:
        self._resample = image_processor.resample
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (1, 3, 256)).swapaxes(0, 1)
        if image_processor.do_rescale:
            levels = image_processor.rescale(levels, image_processor.rescale_factor)
        if image_processor.do_normalize:
            levels = image_processor.normalize(levels, image_processor.image_mean, image_processor.image_std)
        self._table = np.ascontiguousarray(levels[:, 0])  # [3, 256], of the type that the processor gives

    def resize(self, picture: Image.Image, size: Size, whole: Size | None = None) -> Image.Image:
        """The picture at this size.

        Args:
            picture: whole, or with each side divided by a whole number and rounded up.
            size: to make it.
            whole: the size of the whole picture.
        """
        if whole is None or picture.size == whole:
            return picture.resize(size, self._resample)
        # The longer side tells by how much it was divided; that of a few pixels may fit several numbers.
        factor = math.ceil(max(whole) / max(picture.size))
        # The last column and row of a reduced picture may stand for less than a full one.
        return picture.resize(size, self._resample, box=(0, 0, whole[0] / factor, whole[1] / factor))

    def normalise(self, picture: Image.Image) -> Tensor:
        """[3, H, W] of an RGB picture."""
        levels = np.asarray(picture)
        values = np.empty((3, *levels.shape[:2]), self._table.dtype)
        for channel, table in enumerate(self._table):
            # `clip` only lets numpy skip its check: a byte cannot leave the table.
            np.take(table, levels[..., channel], out=values[channel], mode="clip")
        return torch.from_numpy(values)


class SizedPixels:
    """`pixel_values` of an image processor that gives every picture the same size: a resize, perhaps a centre crop."""

    def __init__(self, image_processor: Any, **options: Any) -> None:
        """Args:
        image_processor: a Hugging Face image processor.
        options: for every call of it.
        """
        self._image_processor = image_processor
        self._options = options
        self._prepare: Preparation = self._prepare_as_they_do
        self._resized_to: Callable[[int, int], Size] | None = None
        resized_to = _find_resize(image_processor)
        if resized_to is not None:
            prepare = self._make_preparation(resized_to)
            if agree(prepare, self._prepare_as_they_do):
                self._prepare, self._resized_to = prepare, resized_to

    def wanted_size(self, width: int, height: int) -> Size:
        """What a picture of this size is resized to; the size itself where that is not known."""
        return self._resized_to(width, height) if self._resized_to is not None else (width, height)

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [N, 3, H, W], see `PictureProcessor.pixels`."""
        return prepare_all(self._prepare, pictures, sizes)

    def _prepare_as_they_do(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        prepared = self._image_processor([picture], return_tensors="pt", **self._options)
        return {"pixel_values": prepared["pixel_values"]}

    def _make_preparation(self, resized_to: Callable[[int, int], Size]) -> Preparation:
        values = PictureValues(self._image_processor)
        crop = self._image_processor.crop_size if crops(self._image_processor) else None

        def prepare(picture: Image.Image, size: Size) -> dict[str, Tensor]:
            resized = values.resize(picture, resized_to(*size), size)
            if crop is not None:
                left, top = (resized.width - crop["width"]) // 2, (resized.height - crop["height"]) // 2
                resized = resized.crop((left, top, left + crop["width"], top + crop["height"]))
            return {"pixel_values": values.normalise(resized)[None]}

        return prepare


def prepare_all(
    prepare: Preparation, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None
) -> dict[str, Tensor]:
    """Prepare pictures one by one and join them; without `sizes` the pictures have the size they came in."""
    known = [picture.size for picture in pictures] if sizes is None else sizes
    return join_pixels([prepare(picture, size) for picture, size in zip(pictures, known, strict=True)])


def agree(ours: Preparation, theirs: Preparation, probes: Sequence[Size] = PROBES) -> bool:
    """Whether two preparations give the same numbers, bit for bit, for pictures of noise.

    Which steps an image processor takes is not written in its settings, so it is tried out.
    """
    draw = np.random.default_rng(0)
    for width, height in probes:
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected, found = theirs(picture, picture.size), ours(picture, picture.size)
        if expected.keys() != found.keys() or not all(_is_equal(expected[name], found[name]) for name in expected):
            return False
    return True


def crops(image_processor: Any) -> bool:
    """Whether an image processor cuts out the centre."""
    return bool(image_processor.to_dict().get("do_center_crop"))


def _is_equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _find_resize(image_processor: Any) -> Callable[[int, int], Size] | None:
    """(width, height) -> what the image processor resizes it to; None where it is not a plain one."""
    if not isinstance(image_processor, PilBackend) or not image_processor.do_resize:
        return None
    size = {name: value for name, value in dict(image_processor.size).items() if value is not None}
    if size.keys() == {"height", "width"}:
        return lambda width, height: (size["width"], size["height"])
    if size.keys() == {"shortest_edge"}:
        return lambda width, height: _scale_shortest(width, height, size["shortest_edge"])
    return None


def _scale_shortest(width: int, height: int, shortest: int) -> Size:
    """Scale so that the shorter side is `shortest`; the longer one is rounded down."""
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest
