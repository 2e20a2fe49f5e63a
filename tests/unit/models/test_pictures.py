"""What a picture becomes equals what the model and Hugging Face's own processors make of it."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image
from transformers import Idefics3Processor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from tests.tiny import FAMILIES, noise, tiny_family, tiny_siglip_processor, tiny_tokenizer, token_id
from triptych.core.errors import DataError, ModelError
from triptych.core.protocols import join_pixels
from triptych.models.pictures import PICTURE_TILES, GridPictures, MarkedTilePictures, make_pictures, model_inputs

EVERY = (*FAMILIES, "llava_clip")
EDGES = [(32, 32), (64, 64), (33, 32), (64, 63), (180, 2), (2, 180), (48, 16)]


def _sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return EDGES + [(draw.randint(4, 200), draw.randint(4, 200)) for _ in range(count)]


def _count_features(model: torch.nn.Module, pixels: dict[str, torch.Tensor]) -> int:
    with torch.no_grad():
        pooled = model.model.get_image_features(**model_inputs(pixels), return_dict=True).pooler_output
    if isinstance(pooled, torch.Tensor):
        return pooled.shape[0] * pooled.shape[1]
    return sum(len(part) for part in pooled)


@pytest.mark.requirement("A-25", "A-35", "C-10")
@pytest.mark.parametrize("family", EVERY)
def test_image_tokens_equal_the_models_features(family: str) -> None:
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    for width, height in _sizes(15):
        ids = pictures.token_ids(width, height)
        features = _count_features(model, pictures.pixels([noise(width, height)]))
        assert ids.count(model.config.image_token_id) == features, (width, height)


@pytest.mark.requirement("A-25")
def test_counts_by_hand() -> None:
    def count(family: str, width: int, height: int) -> int:
        model, tokenizer, image_processor = tiny_family(family)
        ids = make_pictures(model.config, image_processor, tokenizer).token_ids(width, height)
        return ids.count(model.config.image_token_id)

    assert count("llava", 7, 100) == 16  # (32 / 8)^2 patches
    assert count("llava_clip", 100, 7) == 16  # and a class token that the `default` selection drops
    assert count("qwen2_5_vl", 48, 32) == 6  # 48 x 32 pixels / (8 x 2)^2
    assert count("gemma3", 500, 20) == 4  # mm_tokens_per_image
    assert count("internvl", 64, 32) == 12  # two tiles and a thumbnail, 4 tokens each
    assert count("internvl", 32, 32) == 4  # one tile needs no thumbnail
    assert count("internvl", 64, 64) == 20  # 2 x 2 tiles and a thumbnail
    assert count("idefics3", 64, 32) == 12  # one row of two tiles and the whole


@pytest.mark.parametrize("family", EVERY)
def test_markers_and_placeholder(family: str) -> None:
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    shown = tokenizer.decode(pictures.token_ids(64, 32)).replace(tokenizer.image_token, "*")
    tiles = "<fake_token_around_image><row_1_col_1>****<fake_token_around_image><row_1_col_2>****\n\n"
    expected = {
        "llava": ("<image>", "*" * 16),
        "llava_clip": ("<image>", "*" * 16),
        "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>********<|vision_end|>"),
        "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>********<|vision_end|>"),
        "smolvlm": ("<image>", f"{tiles}<fake_token_around_image><global-img>****<fake_token_around_image>"),
        "idefics3": ("<image>", f"{tiles}<fake_token_around_image><global-img>****<fake_token_around_image>"),
        "internvl": ("<IMG_CONTEXT>", f"<img>{'*' * 12}</img>"),
        "gemma3": ("<start_of_image>", "\n\n<start_of_image>****<end_of_image>\n\n"),
    }[family]
    assert (pictures.placeholder, shown) == expected


@pytest.mark.requirement("A-25")
@pytest.mark.parametrize("family", ["llava", "llava_clip"])
def test_llava_equals_hugging_faces_processor(family: str) -> None:
    model, tokenizer, image_processor = tiny_family(family)
    theirs = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=int(family == "llava_clip"),
    )
    pictures = make_pictures(model.config, image_processor, tokenizer)
    for width, height in _sizes(3):
        picture = noise(width, height)
        encoded = theirs(images=picture, text="a<image>b", return_tensors="pt")
        ours = [*tokenizer.encode("a"), *pictures.token_ids(width, height), *tokenizer.encode("b")]
        assert encoded["input_ids"][0].tolist() == ours
        assert torch.equal(encoded["pixel_values"], pictures.pixels([picture])["pixel_values"])


@pytest.mark.requirement("A-25")
@pytest.mark.parametrize("merges", [0, 1])
def test_idefics3_equals_hugging_faces_processor(merges: int) -> None:
    model, _, image_processor = tiny_family("idefics3")
    tokenizer = tiny_tokenizer("idefics3", merges=merges)
    model.config.image_token_id = tokenizer.image_token_id
    theirs = Idefics3Processor(image_processor, tokenizer, image_seq_len=4)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    for width, height in _sizes(10):
        picture = noise(width, height)
        encoded = theirs(images=[picture], text="a<image>b", return_tensors="pt")
        ours = [*tokenizer.encode("a"), *pictures.token_ids(width, height), *tokenizer.encode("b")]
        assert encoded["input_ids"][0].tolist() == ours, (width, height)
        assert torch.equal(encoded["pixel_values"], pictures.pixels([picture])["pixel_values"])


def test_gemma3_equals_hugging_faces_processor() -> None:
    model, tokenizer, image_processor = tiny_family("gemma3")
    theirs = Gemma3Processor(image_processor, tokenizer, image_seq_length=4)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    picture = noise(50, 20)
    encoded = theirs(images=[picture], text="a<start_of_image>b", return_tensors="pt")
    ours = [*tokenizer.encode("a"), *pictures.token_ids(50, 20), *tokenizer.encode("b")]
    assert encoded["input_ids"][0].tolist() == ours
    assert torch.equal(encoded["pixel_values"], pictures.pixels([picture])["pixel_values"])


@pytest.mark.parametrize("family", EVERY)
def test_pixels_are_those_of_the_image_processor_bit_for_bit(family: str) -> None:
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    for width, height in _sizes(10):
        picture = noise(width, height)
        options = {"crop_to_patches": True} if family == "internvl" else {}
        given = [[picture]] if family in ("smolvlm", "idefics3") else [picture]
        expected = image_processor(given, return_tensors="pt", **options)
        found = pictures.pixels([picture])
        for name, value in model_inputs(found).items():
            assert torch.equal(value, expected[name]), (name, width, height)


@pytest.mark.parametrize("family", EVERY)
def test_pixels_of_several_pictures_are_those_of_each_joined(family: str) -> None:
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    shown = [noise(width, height) for width, height in ((64, 32), (32, 32), (50, 70))]
    together, joined = pictures.pixels(shown), join_pixels([pictures.pixels([picture]) for picture in shown])
    assert together.keys() == joined.keys()
    assert all(torch.equal(together[name], joined[name]) for name in joined)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("llava", (32, 32)),
        ("llava_clip", (42, 32)),  # 40 / 30 x 32, rounded down; the centre is cut out afterwards
        ("qwen2_5_vl", (64, 48)),  # within 64 x 64 pixels, whole patches of 16
        ("smolvlm", (64, 48)),  # the longest side is 64
        ("internvl", (64, 64)),  # 2 x 2 tiles of 32
        ("gemma3", (32, 32)),
    ],
)
def test_wanted_sizes_by_hand(family: str, size: tuple[int, int]) -> None:
    model, tokenizer, image_processor = tiny_family(family)
    assert make_pictures(model.config, image_processor, tokenizer).wanted_size(400, 300) == size


@pytest.mark.parametrize("family", EVERY)
def test_a_picture_decoded_smaller_becomes_what_the_whole_one_becomes(family: str) -> None:
    """Of the whole picture's shape, even where its own size would give another one, and nearly the same values."""
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    for width, height in ((335, 201), (150, 409), (320, 320), (1001, 331)):
        whole = noise(5, 5).resize((width, height))
        wanted = pictures.wanted_size(width, height)
        factor = int(min(width / wanted[0], height / wanted[1]))
        assert factor >= 2
        size = whole.size
        expected, found = pictures.pixels([whole]), pictures.pixels([whole.reduce(factor)], [size])
        assert all(expected[name].shape == found[name].shape for name in expected), (width, height)
        assert (expected["pixel_values"] - found["pixel_values"]).abs().mean() < 0.05  # values reach from -2 to 2
        features = _count_features(model, found)
        assert pictures.token_ids(width, height).count(model.config.image_token_id) == features


def test_tiles_follow_the_pixels_where_the_libraries_count_does_not() -> None:
    model, tokenizer, image_processor = tiny_family("idefics3")
    image_processor.size = {"longest_edge": 80}
    pictures = make_pictures(model.config, image_processor, tokenizer)
    assert isinstance(pictures, MarkedTilePictures)
    # 80 x 62 is widened to 96, which makes the height 74 and so three rows; the library's count says two.
    assert pictures.grid(80, 62) == (3, 3)
    assert image_processor.get_number_of_image_patches(62, 80)[1:] == (2, 3)
    pixels = pictures.pixels([noise(80, 62)])
    assert pixels["pixel_values"].shape[1] == 10


def test_pixels_of_several_pictures_keep_order_and_count() -> None:
    model, tokenizer, image_processor = tiny_family("internvl")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    first, second = noise(64, 32, seed=1), noise(32, 96, seed=2)
    pixels = pictures.pixels([first, second])
    assert pixels[PICTURE_TILES].tolist() == [3, 4]
    assert set(model_inputs(pixels)) == {"pixel_values"}
    assert torch.equal(pixels["pixel_values"][3:], pictures.pixels([second])["pixel_values"])


@pytest.mark.parametrize("family", EVERY)
def test_a_flat_picture_is_not_turned_on_its_side(family: str) -> None:
    """A picture 3 pixels high looks like three channels to code that guesses."""
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    flat = Image.new("RGB", (60, 3), (255, 0, 0))
    values = pictures.pixels([flat])["pixel_values"]
    if family.startswith("qwen"):
        red, blue = values.reshape(len(values), 3, -1)[:, 0], values.reshape(len(values), 3, -1)[:, 2]
    else:
        red, blue = values.movedim(-3, 0)[0], values.movedim(-3, 0)[2]
    assert red.min() > blue.max()


def test_errors_name_both_sides() -> None:
    model, tokenizer, image_processor = tiny_family("qwen2_5_vl")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    assert isinstance(pictures, GridPictures)
    with pytest.raises(DataError, match="4000 x 4 pixels"):
        pictures.token_ids(4000, 4)
    image_processor.merge_size = 4
    with pytest.raises(ModelError, match="merge_size 4, the model 2"):
        make_pictures(model.config, image_processor, tokenizer)

    llava, tokenizer, _ = tiny_family("llava")
    ragged = CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(ModelError, match="different sizes"):
        make_pictures(llava.config, ragged, tokenizer)
    llava.config.image_token_index = 5000
    with pytest.raises(ModelError, match="id 5000, but the tokenizer has only 315"):
        make_pictures(llava.config, tiny_siglip_processor(), tokenizer)


def test_unknown_family() -> None:
    model, tokenizer, image_processor = tiny_family("llava")
    with pytest.raises(ModelError, match="do not know how a `siglip_vision_model` model"):
        make_pictures(model.config.vision_config, image_processor, tokenizer)
    assert token_id("<image>") == tokenizer.image_token_id
