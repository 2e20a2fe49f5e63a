"""What all formats share: their configuration, and the data set that reads rows through one of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from triptych.core.config import Config
from triptych.core.errors import DataError, Problem
from triptych.core.types import ImageReference, Origin, Sample
from triptych.data.fingerprint import fingerprint_file
from triptych.data.images import resolve_image
from triptych.data.sources import Row, RowSource


class DatasetBase(Config):
    """Keys of every data set."""

    path: str
    """File (.json, .jsonl, .csv, .tsv, .parquet, .tar), folder of shards, saved Hugging Face data set, or pattern."""
    images: str | None = None
    """Image root: pictures are looked up here and nowhere else. Default: the folder of `path`."""
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Share of the draws; give every data set one, or none for every row once an epoch."""
    task: str = ""
    """Task tag of rows that carry none of their own (`task` or `channel`)."""


ConfigType = TypeVar("ConfigType", bound=DatasetBase)


@dataclass(frozen=True)
class RowContext:
    """What a format needs besides the row."""

    root: Path
    """Image root."""
    origin: Origin
    """Place of the row, with its id."""
    task: str
    """The row's own task tag, or the data set's."""
    looks_for_files: bool = True
    """False: pictures are taken as they are spelled, whether or not the files are there."""

    def picture(self, value: Any) -> ImageReference:
        """Turn what a record holds in a picture field into a reference: a name, bytes, or `{"bytes", "path"}`.

        Sources that can read their pictures later (tars, Parquet) hand over references.

        Raises:
            DataError: the value names no picture inside the image root.
        """
        if isinstance(value, ImageReference):
            return value
        if isinstance(value, str):
            return self._find(value)
        if isinstance(value, bytes):
            return ImageReference(data=value, name=f"picture bytes of {self.origin}")
        if isinstance(value, dict):
            data = value.get("bytes")
            names = [value[key] for key in ("url", "path", "image") if value.get(key)]
            if isinstance(data, bytes) and data:
                label = str(names[0]) if names else f"picture bytes of {self.origin}"
                return ImageReference(data=data, name=label)
            if names and isinstance(names[0], str):
                return self._find(names[0])
        shown = repr(value)[:80]
        message = f"`{shown}` is not a picture"
        raise DataError(Problem(message, remedy='give a path, a data: URL, or {"bytes": ..., "path": ...}'))

    def _find(self, name: str) -> ImageReference:
        return resolve_image(self.root, name) if self.looks_for_files else ImageReference(path=name, name=name)


ReadRow = Callable[[Row, ConfigType, RowContext], Sequence[Sample]]
"""Reads one row into its samples (one, but for a row with several captions)."""
CountSamples = Callable[[RowSource, ConfigType], Sequence[int] | None]
"""Samples of each row, or None where every row is one sample."""


class Dataset:
    """Samples of one data set by number. Opening reads no row and decodes no picture."""

    def __init__(
        self,
        config: DatasetBase,
        source: RowSource,
        root: Path,
        read: ReadRow[Any],
        row_of: Sequence[tuple[int, int]] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        """Args:
        config: its configuration.
        source: where rows come from.
        root: image root.
        read: the format.
        row_of: for each sample (row, which of the row's samples); None when sample i is row i.
        files: the files that hold the rows, by the names messages give them.
        """
        self.config = config
        self._source, self._root, self._read, self._row_of = source, root, read, row_of
        self._files = files or {}

    @property
    def name(self) -> str:
        """How messages call this data set: its path in the recipe."""
        return self.config.path

    def __len__(self) -> int:
        return len(self._source) if self._row_of is None else len(self._row_of)

    def origin(self, index: int) -> Origin:
        """Where sample `index` stands, without reading it (the id is therefore missing)."""
        file, line = self._source.place(self._locate(index)[0])
        return Origin(file, line)

    def fingerprint(self) -> dict[str, str]:
        """Data file -> digest that changes with its content; pictures beside it are not looked at."""
        return {name: fingerprint_file(path) for name, path in self._files.items()}

    def sample(self, index: int) -> Sample:
        """Read one sample; its pictures are located, not decoded.

        Raises:
            DataError: the row is broken or breaks a rule of its format; every problem has file and line.
        """
        return self._sample(index, looks_for_files=True)

    def picture_key(self, index: int) -> tuple[str, ...] | None:
        """Equal for samples of a run that show the same pictures in the same order; None without pictures.

        A function of the data file alone: whether pictures are there, and what they hold, makes no difference.
        """
        row_index, _ = self._locate(index)
        if self._source.holds_pictures:
            place = self.origin(index)
            return (place.file, str(row_index))
        try:
            sample = self._sample(index, looks_for_files=False)
        except DataError:
            return None
        return (str(self._root.absolute()), *(_short(image) for image in sample.images)) if sample.images else None

    def _sample(self, index: int, looks_for_files: bool) -> Sample:
        row_index, part = self._locate(index)
        place = self.origin(index)
        try:
            row = self._source.row(row_index)
            origin = replace(place, id=_identify(row, place, row_index))
            task = next((row[key] for key in ("task", "channel") if _is_tag(row.get(key))), self.config.task)
            samples = self._read(row, self.config, RowContext(self._root, origin, task, looks_for_files))
            if self._row_of is None and len(samples) > 1:
                message = f"the row holds {len(samples)} captions, the first rows of the file hold one each"
                remedy = "give one of the first eight rows a list too, then every row's captions are counted"
                raise DataError(Problem(message, remedy=remedy))
            return _weigh(samples[part], row)
        except DataError as error:
            raise located(error, place) from error

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        return (index, 0) if self._row_of is None else self._row_of[index]


def located(error: DataError, origin: Origin) -> DataError:
    """The same error with file and line of `origin` wherever a problem has none."""
    problems = [item if item.file else replace(item, file=origin.file, line=origin.line) for item in error.problems]
    return DataError(problems)


def _identify(row: Row, place: Origin, row_index: int) -> str:
    for key in ("id", "idx", "__key__"):
        value = row.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)
    # The row number, not the line: a minified JSON list has all its rows on line 1.
    return f"{Path(place.file).stem}-{row_index + 1}"


def _weigh(sample: Sample, row: Row) -> Sample:
    """The sample with the row's own weight, which counts for its tokens and its pairs."""
    given = [key for key in ("weight", "loss_weight") if row.get(key) not in (None, "")]
    if not given:
        return sample
    key = given[0]
    if len(given) > 1:
        raise DataError(Problem("the row has both `weight` and `loss_weight`", key=key, remedy="keep one of them"))
    try:
        weight = math.nan if isinstance(row[key], bool) else float(row[key])  # a table holds it as text
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        remedy = "give a number above 0; to leave the row out, drop it from the file"
        raise DataError(Problem(f"the row has `{key}: {row[key]}`", key=key, remedy=remedy))
    preference = sample.preference
    if preference is not None:
        preference = replace(
            preference, pairs=tuple(replace(pair, weight=pair.weight * weight) for pair in preference.pairs)
        )
    return replace(sample, preference=preference, weight=sample.weight * weight)


def _short(image: ImageReference) -> str:
    """The picture as the row spells it; a digest of one that is spelled out in the row."""
    if image.data is None and len(image.path or "") < 512:
        return str(image.path)
    return hashlib.blake2b(image.data or str(image.path).encode(), digest_size=16).hexdigest()


def _is_tag(value: object) -> bool:
    return isinstance(value, str) and value != ""
