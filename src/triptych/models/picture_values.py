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
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend

from triptych.core.protocols import join_pixels

Size = tuple[int, int]
"""(width, height) in pixels."""
Preparation = Callable[[Image.Image, Size], dict[str, Tensor]]
"""(RGB picture, the size it had before it was reduced) -> vision inputs of this picture alone."""

_INTERPOLATED = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
"""Filters with which torch resizes bytes, and its names for them."""

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
        resized = self._resize(picture, size, whole)
        return resized if isinstance(resized, Image.Image) else Image.fromarray(resized)

    def values(self, picture: Image.Image, size: Size, whole: Size | None = None) -> Tensor:
        """[3, H, W]: the picture at this size, see `resize`, and normalised."""
        return self.normalise(self._resize(picture, size, whole))

    def normalise(self, picture: Image.Image | NDArray[np.uint8]) -> Tensor:
        """[3, H, W] of an RGB picture, or of its levels [H, W, 3]."""
        levels = np.asarray(picture)
        values = np.empty((3, *levels.shape[:2]), self._table.dtype)
        for channel, table in enumerate(self._table):
            # `clip` only lets numpy skip its check: a byte cannot leave the table.
            np.take(table, levels[..., channel], out=values[channel], mode="clip")
        return torch.from_numpy(values)

    def _resize(self, picture: Image.Image, size: Size, whole: Size | None) -> Image.Image | NDArray[np.uint8]:
        if whole is None or picture.size == whole:
            return picture.resize(size, self._resample)
        # The longer side tells by how much it was divided; that of a few pixels may fit several numbers.
        factor = math.ceil(max(whole) / max(picture.size))
        # The last column and row of a reduced picture may stand for less than a full one.
        covered = whole[0] / factor, whole[1] / factor
        mode = _INTERPOLATED.get(self._resample)
        if mode is None or any(new > old for new, old in zip(size, covered, strict=True)):
            return picture.resize(size, self._resample, box=(0, 0, *covered))
        return _interpolate(picture, size, covered, mode)


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
            if crop is None:
                return {"pixel_values": values.values(picture, resized_to(*size), size)[None]}
            resized = values.resize(picture, resized_to(*size), size)
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


def _interpolate(picture: Image.Image, size: Size, covered: tuple[float, float], mode: str) -> NDArray[np.uint8]:
    """Levels [H, W, 3] of `picture.resize(size, box=(0, 0, *covered))` in a quarter of its time, few of them one off.

    Args:
        size: no side is longer than covered.
        covered: how much of the picture the whole of it is resized from: less than a pixel of each side is left out.
        mode: torch's name of the filter.
    """
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    # torch takes factors instead of a box, and rounds the sides they lead to down: less than a pixel more is no pixel.
    factors = [(new + 1e-6) / old for new, old in zip(reversed(size), reversed(covered), strict=True)]
    resized = F.interpolate(levels, scale_factor=factors, mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


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
