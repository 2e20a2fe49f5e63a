"""How each family turns a picture into token ids and pixels.

Built from a Hugging Face *image processor*, the tokenizer and the model, since the combined processors of several
families cannot be constructed without video libraries. What a picture becomes equals what those processors make of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from triptych.core.errors import DataError, ModelError, Problem
from triptych.core.protocols import PictureProcessor
from triptych.models.components import PictureKind, picture_kind
from triptych.models.picture_values import PictureValues, Size, SizedPixels, agree, crops, prepare_all

PICTURE_TILES = "num_patches"
"""Key of `pixels` that is no model input: [N] int64 tiles of each picture, where one picture fills several entries."""


def make_pictures(
    config: PreTrainedConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase
) -> PictureProcessor:
    """The picture processor of a model; needs no weights.

    Args:
        config: configuration of the whole model.
        image_processor: a Hugging Face image processor (Pillow variant) with the settings of the checkpoint.

    Raises:
        ModelError: the family is not known, or model, image processor and tokenizer do not fit together.
    """
    classes: dict[PictureKind, Callable[..., PictureProcessor]] = {
        "fixed": FixedPictures,
        "grid": GridPictures,
        "marked_tiles": MarkedTilePictures,
        "tiles": TilePictures,
        "wrapped": WrappedPictures,
    }
    return classes[picture_kind(config)](image_processor, tokenizer, config)


def model_inputs(pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`pixels` without our own bookkeeping: what the model's forward and `generate` take."""
    return {name: value for name, value in pixels.items() if name != PICTURE_TILES}


class FixedPictures:
    """Every picture becomes the same number of tokens (Llava with any tower)."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """
        Raises:
            ModelError: the image processor leaves pictures different sizes.
        """
        size = image_processor.crop_size if crops(image_processor) else image_processor.size
        if not (size and size.get("height") and size.get("width")):
            raise ModelError(
                Problem(
                    f"{type(image_processor).__name__} gives pictures different sizes (size {dict(size)}, no centre "
                    "crop), but this family has a fixed number of tokens for each",
                    remedy="give `size` a height and a width, or switch `do_center_crop` on",
                )
            )
        self._sized = SizedPixels(image_processor)
        self._image_token_id = int(config.image_token_id)
        self._placeholder = _token(tokenizer, self._image_token_id)
        self._count = self._measure(config)

    @property
    def placeholder(self) -> str:
        """The image token."""
        return self._placeholder

    def token_ids(self, width: int, height: int) -> list[int]:
        """The image token, once for each feature."""
        return [self._image_token_id] * self._count

    def wanted_size(self, width: int, height: int) -> Size:
        """Before a centre crop, if there is one."""
        return self._sized.wanted_size(width, height)

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [N, 3, H, W]."""
        return self._sized.pixels(pictures, sizes)

    def _measure(self, config: PreTrainedConfig) -> int:
        """Features of one picture, from the shapes of a tower without weights.

        Class tokens, registers and poolings differ from tower to tower, and `image_seq_length` of a configuration is
        often the default of another tower.
        """
        with torch.device("meta"):
            tower = AutoModel.from_config(config.vision_config)
        pixels = self.pixels([Image.new("RGB", (32, 32), (96, 96, 96))])["pixel_values"]
        with torch.no_grad():
            states = tower(pixels.to("meta", tower.dtype), output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        count = int(states[layers if isinstance(layers, int) else layers[0]].shape[1])
        return count - (config.vision_feature_select_strategy == "default")


class GridPictures:
    """A picture keeps its proportions and becomes a grid of merged patches between two markers (Qwen-VL)."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """
        Raises:
            ModelError: patch or merge size of the image processor and the model differ.
        """
        for name, theirs in (
            ("patch_size", config.vision_config.patch_size),
            ("merge_size", config.vision_config.spatial_merge_size),
            ("temporal_patch_size", config.vision_config.temporal_patch_size),
        ):
            ours = getattr(image_processor, name)
            if ours != theirs:
                raise ModelError(
                    Problem(
                        f"the image processor has {name} {ours}, the model {theirs}",
                        remedy="use the image processor of the checkpoint",
                    )
                )
        self._image_processor = image_processor
        self._ids = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
        self._placeholder = "".join(_token(tokenizer, index) for index in self._ids)
        self._values = PictureValues(image_processor)
        is_known = image_processor.do_resize and agree(self._prepare, self._prepare_as_they_do)
        self._preparation = self._prepare if is_known else self._prepare_as_they_do
        self._reduces = is_known

    @property
    def placeholder(self) -> str:
        """Start marker, image token, end marker."""
        return self._placeholder

    def token_ids(self, width: int, height: int) -> list[int]:
        """Start marker, one image token for each merged patch, end marker.

        Raises:
            DataError: the picture is more than 200 times longer than wide, which these models do not take.
        """
        try:
            patches = self._image_processor.get_number_of_image_patches(height, width)
        except ValueError as error:
            raise DataError(
                Problem(f"a picture of {width} x {height} pixels: {error}", remedy="crop the picture")
            ) from error
        start, image, end = self._ids
        return [start, *[image] * (patches // self._image_processor.merge_size**2), end]

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [patches of all pictures, values of a patch], `image_grid_thw` [N, 3]."""
        return prepare_all(self._preparation, pictures, sizes)

    def wanted_size(self, width: int, height: int) -> Size:
        """Whole merged patches, as many pixels as the image processor's limits allow."""
        return self._resized_to(width, height) if self._reduces else (width, height)

    def _resized_to(self, width: int, height: int) -> Size:
        processor = self._image_processor
        factor = processor.patch_size * processor.merge_size
        limits = {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
        new_height, new_width = smart_resize(height, width, factor, **limits)
        return new_width, new_height

    def _prepare(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        processor = self._image_processor
        values = self._values.values(picture, self._resized_to(*size), size).numpy()
        patches, rows, columns = processor.patchify(
            values, processor.patch_size, processor.merge_size, processor.temporal_patch_size
        )
        return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor([[1, rows, columns]])}

    def _prepare_as_they_do(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        prepared = self._image_processor([picture], return_tensors="pt")
        return {name: prepared[name] for name in ("pixel_values", "image_grid_thw")}


class MarkedTilePictures:
    """A picture becomes rows and columns of tiles, each after a marker, and a small whole (Idefics3, SmolVLM)."""

    MAX_SIDE = 4096
    """Side to which these image processors limit every picture."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        self._image_processor = image_processor
        self._image_token = _token(tokenizer, config.image_token_id)
        self._tile = int(image_processor.max_image_size["longest_edge"])
        self._count = (self._tile // config.vision_config.patch_size) ** 2 // config.scale_factor**2
        self._encode = lru_cache(maxsize=256)(self._encode_grid)
        self._tokenizer = tokenizer
        self._values = PictureValues(image_processor)
        # A narrow probe: a square one would be cut into a tile for every corner of the largest picture.
        is_known = agree(self._prepare, self._prepare_as_they_do, [(80, 9)])
        self._preparation = self._prepare if is_known else self._prepare_as_they_do
        self._reduces = is_known and image_processor.do_resize
        if len(self.token_ids(1, 1)) < self._count:
            raise ModelError(Problem("the tokenizer merges image tokens", remedy="use the tokenizer of the checkpoint"))

    @property
    def placeholder(self) -> str:
        """The image token."""
        return self._image_token

    def token_ids(self, width: int, height: int) -> list[int]:
        """Markers and image tokens of all tiles, row by row, then of the whole picture."""
        return list(self._encode(*self.grid(width, height)))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles, (0, 0) for a picture that is not split.

        The image processor's own `get_number_of_image_patches` differs from what it does to pixels when the resized
        picture is no multiple of the tile, so this follows the pixels.
        """
        processor, tile = self._image_processor, self._tile
        if not processor.do_image_splitting:
            return 0, 0
        if processor.do_resize:
            width, height = self._resized_to(width, height)
        aspect = width / height
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / aspect) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * aspect) / tile) * tile
        return (height // tile, width // tile) if max(width, height) > tile else (0, 0)

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [N, most tiles, 3, H, W], zeros where a picture has fewer, and `pixel_attention_mask`."""
        return prepare_all(self._preparation, pictures, sizes)

    def wanted_size(self, width: int, height: int) -> Size:
        """The longest side of the image processor; what is cut into tiles is made larger from that."""
        return self._resized_to(width, height) if self._reduces else (width, height)

    def _resized_to(self, width: int, height: int) -> Size:
        width, height = _fit_longest(width, height, int(self._image_processor.size["longest_edge"]))
        return _limit_longest(width, height, self.MAX_SIDE)

    def _prepare(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        if self._image_processor.do_resize:
            picture = self._values.resize(picture, self._resized_to(*size), size)
        rows, columns = self.grid(*size)
        whole = self._values.resize(picture, (max(1, columns) * self._tile, max(1, rows) * self._tile))
        tiles = _cut(self._values.normalise(whole), self._tile, self._tile)
        if rows:
            small = self._values.values(whole, (self._tile, self._tile))
            tiles = torch.cat([tiles, small[None]])
        mask = torch.ones(1, len(tiles), self._tile, self._tile, dtype=torch.int64)
        return {"pixel_values": tiles[None], "pixel_attention_mask": mask}

    def _prepare_as_they_do(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        prepared = self._image_processor([[picture]], return_tensors="pt")
        return {name: prepared[name] for name in ("pixel_values", "pixel_attention_mask")}

    def _encode_grid(self, rows: int, columns: int) -> tuple[int, ...]:
        # One string, encoded at once: whether two newlines are one token is the tokenizer's business.
        images = self._image_token * self._count
        text = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"<fake_token_around_image><row_{row}_col_{column}>{images}"
            text += "\n"
        text += "\n" if rows else ""
        text += f"<fake_token_around_image><global-img>{images}<fake_token_around_image>"
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


class TilePictures:
    """A picture becomes tiles and a thumbnail, all between two markers (InternVL)."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """
        Raises:
            ModelError: the tokenizer lacks a marker.
        """
        self._image_processor = image_processor
        self._ids = (_token_id(tokenizer, "<img>"), int(config.image_token_id), _token_id(tokenizer, "</img>"))
        self._placeholder = _token(tokenizer, config.image_token_id)
        patch_height, patch_width = config.vision_config.patch_size
        rows = int(image_processor.size["height"] // patch_height * config.downsample_ratio)
        columns = int(image_processor.size["width"] // patch_width * config.downsample_ratio)
        self._count = rows * columns
        self._values = PictureValues(image_processor)
        is_known = image_processor.do_resize and agree(self._prepare, self._prepare_as_they_do)
        self._preparation = self._prepare if is_known else self._prepare_as_they_do
        self._reduces = is_known

    @property
    def placeholder(self) -> str:
        """The image token."""
        return self._placeholder

    def token_ids(self, width: int, height: int) -> list[int]:
        """Start marker, the image tokens of all tiles and the thumbnail, end marker."""
        tiles = self._image_processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        start, image, end = self._ids
        return [start, *[image] * (tiles * self._count), end]

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [tiles of all pictures, 3, H, W] and the tiles of each picture."""
        return prepare_all(self._preparation, pictures, sizes)

    def wanted_size(self, width: int, height: int) -> Size:
        """All tiles together; the thumbnail is smaller."""
        if not self._reduces:
            return width, height
        columns, rows = self._grid(width, height)
        return columns * int(self._image_processor.size["width"]), rows * int(self._image_processor.size["height"])

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles."""
        processor = self._image_processor
        tile = (processor.size["height"], processor.size["width"])
        columns, rows = get_optimal_tiled_canvas((height, width), tile, processor.min_patches, processor.max_patches)
        return columns, rows

    def _prepare(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        columns, rows = self._grid(*size)
        width, height = int(self._image_processor.size["width"]), int(self._image_processor.size["height"])
        tiles = _cut(self._values.values(picture, (columns * width, rows * height), size), width, height)
        if len(tiles) > 1:
            thumbnail = self._values.values(picture, (width, height), size)
            tiles = torch.cat([tiles, thumbnail[None]])
        return {"pixel_values": tiles, PICTURE_TILES: torch.tensor([len(tiles)])}

    def _prepare_as_they_do(self, picture: Image.Image, size: Size) -> dict[str, Tensor]:
        # The combined processor always splits, whatever the image processor's own setting says.
        prepared = self._image_processor([picture], crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": prepared["pixel_values"], PICTURE_TILES: torch.as_tensor(prepared["num_patches"])}


class WrappedPictures:
    """Every picture becomes the same number of tokens between markers and blank lines (Gemma 3)."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        blank = tokenizer.encode("\n\n", add_special_tokens=False)
        images = [int(config.image_token_id)] * int(config.mm_tokens_per_image)
        # No extra crops, as the combined processor's default.
        self._sized = SizedPixels(image_processor, do_pan_and_scan=False)
        self._placeholder = _token(tokenizer, config.boi_token_index)
        self._ids = [*blank, int(config.boi_token_index), *images, int(config.eoi_token_index), *blank]

    @property
    def placeholder(self) -> str:
        """The start marker."""
        return self._placeholder

    def token_ids(self, width: int, height: int) -> list[int]:
        """Blank line, start marker, image tokens, end marker, blank line."""
        return list(self._ids)

    def wanted_size(self, width: int, height: int) -> Size:
        """The same for every picture."""
        return self._sized.wanted_size(width, height)

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [N, 3, H, W]."""
        return self._sized.pixels(pictures, sizes)


def _cut(whole: Tensor, width: int, height: int) -> Tensor:
    """Tiles [N, 3, height, width] of a picture [3, H, W], row by row."""
    rows, columns = whole.shape[1] // height, whole.shape[2] // width
    return whole.reshape(3, rows, height, columns, width).permute(1, 3, 0, 2, 4).reshape(-1, 3, height, width)


def _fit_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """Scale so that the longer side is `longest` and the shorter is even, as the Idefics3 image processor does."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def _limit_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    aspect = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, 1), max(height, 1)


def _token(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    token = tokenizer.convert_ids_to_tokens(int(index))
    if not isinstance(token, str):
        raise ModelError(
            Problem(
                f"the model's image token has id {index}, but the tokenizer has only {len(tokenizer)} tokens",
                remedy="use the tokenizer of the checkpoint",
            )
        )
    return token


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ModelError(Problem(f"the tokenizer has no `{token}` token", remedy="use the tokenizer of the checkpoint"))
    return int(index)
