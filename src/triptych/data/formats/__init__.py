"""Data set formats: a row of somebody's file in, a `Sample` out.

To add one: a file with a Config class and a read function, and a line in each of the two tables below.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from triptych.core.errors import DataError, Problem
from triptych.data.formats.base import CountSamples, Dataset, DatasetBase, ReadRow, located
from triptych.data.formats.captions import CaptionsConfig, count_captions, read_caption_row
from triptych.data.formats.llava import LlavaConfig, read_llava_row
from triptych.data.formats.messages import MessagesConfig, read_messages_row
from triptych.data.formats.preference import PreferenceConfig, read_preference_row
from triptych.data.formats.texts import TextsConfig, read_texts_row
from triptych.data.sources import data_files, open_source


@dataclass(frozen=True)
class Format:
    """How rows of one format are read."""

    read: ReadRow[Any]
    count: CountSamples[Any] | None = None
    """Given where a row may hold several samples."""


FORMATS: dict[str, Format] = {
    "llava": Format(read_llava_row),
    "messages": Format(read_messages_row),
    "texts": Format(read_texts_row),
    "captions": Format(read_caption_row, count_captions),
    "preference": Format(read_preference_row),
}

DatasetConfig = Annotated[
    LlavaConfig | MessagesConfig | TextsConfig | CaptionsConfig | PreferenceConfig, Field(discriminator="format")
]
"""One entry of a recipe's `data:` list, told apart by `format`."""

AnyDatasetConfig = LlavaConfig | MessagesConfig | TextsConfig | CaptionsConfig | PreferenceConfig


def open_dataset(config: AnyDatasetConfig, base: Path) -> Dataset:
    """Open one data set.

    Args:
        config: its entry in the recipe.
        base: folder that relative `path` and `images` are relative to.

    Raises:
        DataError: a file or folder is missing, or a file cannot be cut into rows.
    """
    source = open_source(base / config.path, config.path)
    path = base / config.path
    root = base / config.images if config.images is not None else (path if path.is_dir() else path.parent)
    if config.images is not None and not root.is_dir():
        message = f"the image root {config.images} of {config.path} is not a folder"
        raise DataError(Problem(message, file=config.images, remedy="set `images:` to the folder that holds them"))
    chosen = FORMATS[config.format]
    counts = chosen.count(source, config) if chosen.count else None
    row_of = None if counts is None else _expand(counts)
    return Dataset(config, source, root, chosen.read, row_of, data_files(path, config.path))


def _expand(counts: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.chain.from_iterable(((row, part) for part in range(n)) for row, n in enumerate(counts)))


__all__ = [
    "FORMATS",
    "AnyDatasetConfig",
    "CaptionsConfig",
    "Dataset",
    "DatasetBase",
    "DatasetConfig",
    "Format",
    "LlavaConfig",
    "MessagesConfig",
    "PreferenceConfig",
    "TextsConfig",
    "located",
    "open_dataset",
]
