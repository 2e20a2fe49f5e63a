"""Pictures with captions: CSV or TSV, JSON Lines, webdataset tars, Parquet."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from triptych.core.config import did_you_mean
from triptych.core.errors import DataError, Problem
from triptych.core.types import ImageReference, Message, Part, Sample, Text
from triptych.data.formats.base import DatasetBase, RowContext
from triptych.data.sources import PICTURE_SUFFIXES, Row, RowSource

_IMAGE_NAMES = ("image", "image_path", "filepath", "file_name", "filename", "path", *PICTURE_SUFFIXES)
_TEXT_NAMES = ("caption", "captions", "title", "text", "txt")

BRIEF_PROMPTS = (
    "Describe the picture in a few words.",
    "Give a short caption for this image.",
    "What does this image show? Answer briefly.",
    "Sum up the picture in one sentence.",
    "Write one short line about what can be seen.",
    "In brief, what is in this photo?",
)
"""Requests for a short caption, for `prompts: brief`."""


class CaptionsConfig(DatasetBase):
    """Rows of one picture and its caption; a list of captions makes one sample each."""

    format: Literal["captions"]
    """Selects this format."""
    task: str = "caption"
    """Task tag of rows that carry none of their own."""
    image_column: str | None = None
    """Column, key or tar extension of the picture. Default: the first known one, such as `image` or `filepath`."""
    text_column: str | None = None
    """Column or key of the caption, in a tar also a key of its `.json`. Default: the first known one."""
    prompts: tuple[str, ...] | Literal["brief"] = ()
    """Requests put behind the picture, one a row, chosen by the row's id. None: picture and caption alone, as in LLaVA
    stage 1."""


def read_caption_row(row: Row, config: CaptionsConfig, context: RowContext) -> Sequence[Sample]:
    """Read one row into a sample for each of its captions.

    Raises:
        DataError: the picture or the caption is missing, empty or of the wrong type.
    """
    picture = _find_picture(row, config, context)
    captions = _find_captions(row, config)
    texts = captions if isinstance(captions, list) else [captions]
    samples = []
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            message = "the caption is empty" if isinstance(text, str) or text is None else f"the caption is {text!r}"
            raise DataError(Problem(message, key=config.text_column, remedy="write the caption or drop the row"))
        origin = context.origin
        if isinstance(captions, list):
            origin = replace(origin, id=f"{origin.id}#{number}")
        request: tuple[Part, ...] = (picture, *_prompt(config, origin.id))
        messages = (Message("user", request), Message("assistant", (Text(text.strip()),)))
        samples.append(Sample(messages, origin, task=context.task))
    return samples


def count_captions(source: RowSource, config: CaptionsConfig) -> Sequence[int] | None:
    """Captions of each row, or None where rows hold one each; the first rows tell which.

    A list that comes only later is an error of its row: see `Dataset.sample`.
    """
    if not any(isinstance(captions, list) for captions in _captions_of(source, config, range(min(8, len(source))))):
        return None
    # A row that cannot be read still counts one sample, so that it is reported.
    every = _captions_of(source, config, range(len(source)))
    return [max(1, len(captions)) if isinstance(captions, list) else 1 for captions in every]


def _captions_of(source: RowSource, config: CaptionsConfig, rows: Iterable[int]) -> Iterable[Any]:
    for index in rows:
        try:
            yield _find_captions(source.row(index), config)
        except DataError:
            yield None


def _find_picture(row: Row, config: CaptionsConfig, context: RowContext) -> ImageReference:
    column = config.image_column or _first(row, _IMAGE_NAMES)
    value = row.get(column) if column else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not value:
        raise DataError(_missing("picture", "image_column", column, row))
    return context.picture(value)


def _find_captions(row: Row, config: CaptionsConfig) -> Any:
    nested = row["json"] if "__key__" in row and isinstance(row.get("json"), dict) else {}
    for names in (row, nested):
        column = config.text_column or _first(names, _TEXT_NAMES)
        if column and names.get(column) is not None and names[column] != []:
            return names[column]
    raise DataError(_missing("caption", "text_column", config.text_column, row | nested))


def _first(row: Row, names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _missing(what: str, option: str, column: str | None, row: Row) -> Problem:
    names = [name for name in row if name != "__key__"]
    if column is None:
        message = f"the row has no {what} under a known name; it has {', '.join(f'`{name}`' for name in names)}"
        return Problem(message, remedy=f"name it with `{option}:`")
    if column in row:
        return Problem(f"the {what} in `{column}` is empty", key=column, remedy=f"add the {what} or drop the row")
    return Problem(f"the row has no `{column}` for its {what}", key=column, remedy=did_you_mean(column, names))


def _prompt(config: CaptionsConfig, identity: str) -> tuple[Text, ...]:
    prompts = BRIEF_PROMPTS if config.prompts == "brief" else config.prompts
    return (Text("\n" + prompts[zlib.crc32(identity.encode()) % len(prompts)]),) if prompts else ()
