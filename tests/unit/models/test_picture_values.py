"""The numbers of Hugging Face's image processors, bit for bit, or theirs where ours would be others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny import noise
from triptych.models.picture_values import PictureValues, SizedPixels, agree

SQUARE = {"height": 24, "width": 24}
KNOWN = {
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "not square": SiglipImageProcessorPil(size={"height": 20, "width": 30}),
    "other means": SiglipImageProcessorPil(size=SQUARE, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.2]),
    "not normalised": SiglipImageProcessorPil(size=SQUARE, do_normalize=False),
    "not rescaled": SiglipImageProcessorPil(size=SQUARE, do_rescale=False),
    "as bytes": SiglipImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
    "gemma": Gemma3ImageProcessorPil(size=SQUARE),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE),
    "crop with odd borders": CLIPImageProcessorPil(size={"shortest_edge": 27}, crop_size={"height": 20, "width": 24}),
}
LEFT_TO_THEM = {
    "does not resize": CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
    "fits into a box": SiglipImageProcessorPil(
        size={"max_height": 24, "max_width": 24}, do_pad=True, pad_size={"height": 24, "width": 24}
    ),
    "pads behind": SiglipImageProcessorPil(size=SQUARE, do_pad=True, pad_size={"height": 30, "width": 24}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_settings_give_the_same_numbers_and_a_size(name: str) -> None:
    processor = KNOWN[name]
    sized = SizedPixels(processor)
    assert sized.wanted_size(301, 200) != (301, 200)
    for size in ((301, 200), (24, 24), (7, 90), (640, 480)):
        picture = noise(*size)
        expected, found = processor([picture], return_tensors="pt")["pixel_values"], sized.pixels([picture])
        assert found["pixel_values"].dtype == expected.dtype
        assert torch.equal(found["pixel_values"], expected), size


@pytest.mark.parametrize("name", LEFT_TO_THEM)
def test_other_settings_are_left_to_the_image_processor(name: str) -> None:
    """Its own result, and no picture is decoded smaller."""
    processor = LEFT_TO_THEM[name]
    sized = SizedPixels(processor)
    assert sized.wanted_size(400, 300) == (400, 300)
    picture = noise(400, 300)
    expected = processor([picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(sized.pixels([picture])["pixel_values"], expected)


def test_a_processor_with_steps_of_its_own_is_found_out() -> None:
    class Inverting(SiglipImageProcessorPil):
        def normalize(self, image: Any, *arguments: Any, **options: Any) -> Any:
            return super().normalize(image, *arguments, **options)[..., ::-1]

    sized = SizedPixels(Inverting(size=SQUARE))
    assert sized.wanted_size(400, 300) == (400, 300)
    picture = noise(40, 30)
    mirrored = KNOWN["siglip"]([picture], return_tensors="pt")["pixel_values"].flip(3)
    assert torch.equal(sized.pixels([picture])["pixel_values"], mirrored)


def test_sizes_by_hand() -> None:
    assert SizedPixels(KNOWN["not square"]).wanted_size(400, 300) == (30, 20)
    assert SizedPixels(KNOWN["clip"]).wanted_size(301, 200) == (36, 24)  # 24 x 301 / 200 = 36.1
    assert SizedPixels(KNOWN["clip"]).wanted_size(200, 301) == (24, 36)


def test_a_reduced_picture_is_resized_by_what_its_last_column_stands_for() -> None:
    """An eighth of 130 columns is 16.25: the 17th stands for 2 of them. Taken for a whole one, all would be shifted."""
    values = PictureValues(SiglipImageProcessorPil())
    ramp = Image.new("RGB", (130, 8))
    for column in range(130):
        ramp.paste((column + 60,) * 3, (column, 0, column + 1, 8))
    reduced = ramp.reduce(8)
    assert reduced.size == (17, 1)

    def error(picture: Image.Image) -> float:
        levels = [[item.getpixel((column, 0))[0] for column in range(10)] for item in (whole, picture)]  # type: ignore[index]
        return sum(abs(left - right) for left, right in zip(*levels, strict=True)) / 10

    whole = values.resize(ramp, (10, 1))
    assert error(values.resize(reduced, (10, 1), ramp.size)) < 1 < 2 < error(values.resize(reduced, (10, 1)))


def test_a_thin_picture_was_divided_by_the_same_number_both_ways() -> None:
    """33 rows become 5 through 1/7 and through 1/8; that it was 1/8 only the 1,000 columns tell."""
    values = PictureValues(SiglipImageProcessorPil())
    ramp = Image.new("RGB", (1000, 33))
    for row in range(33):
        ramp.paste((7 * row,) * 3, (0, row, 1000, row + 1))
    reduced = ramp.reduce(8)
    assert reduced.size == (125, 5)
    whole, found = (values.resize(*given) for given in ((ramp, (9, 3)), (reduced, (9, 3), ramp.size)))
    rows = [[item.getpixel((4, row))[0] for row in range(3)] for item in (whole, found)]  # type: ignore[index]
    assert rows[1] == pytest.approx(rows[0], abs=6)


@pytest.mark.parametrize("resample", ["BILINEAR", "BICUBIC", "LANCZOS"])
@settings(max_examples=60)
@given(st.data())
def test_a_reduced_picture_is_resized_as_pillow_does(resample: str, data: st.DataObject) -> None:
    """Of any size, by any number; bytes that torch resizes may be a level off, others not."""
    width, height = (data.draw(st.integers(64, 400)) for _ in range(2))
    factor = data.draw(st.integers(2, 8))
    size = (data.draw(st.integers(8, width // factor)), data.draw(st.integers(8, height // factor)))
    reduced = noise(width, height, seed=width).reduce(factor)
    values = PictureValues(SiglipImageProcessorPil(resample=Image.Resampling[resample]))
    found = values.resize(reduced, size, (width, height))
    expected = reduced.resize(size, Image.Resampling[resample], box=(0, 0, width / factor, height / factor))
    assert found.size == size
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= (0 if resample == "LANCZOS" else 2)
    assert difference.mean() < 0.25  # a tenth of a pixel's shift would be several levels
    normalised = values.values(reduced, size, (width, height))
    assert torch.equal(normalised, values.normalise(found))


def test_agreement_is_bit_for_bit_and_by_name() -> None:
    def ours(picture: Image.Image, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"a": torch.tensor([float(picture.width)])}

    assert agree(ours, ours)
    assert not agree(ours, lambda picture, size: {"a": torch.tensor([picture.width + 1e-5])})
    assert not agree(ours, lambda picture, size: {"a": torch.tensor([picture.width])})
    assert not agree(ours, lambda picture, size: {"b": torch.tensor([float(picture.width)])})
