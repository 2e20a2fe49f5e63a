"""Rows of files, with random access and the place of each row.

Opening indexes a file (positions and lines only); a row is read when asked for. A broken row is an error of that row;
a file that cannot be cut into rows at all is an error of the file, with its position.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from triptych.core.config import did_you_mean
from triptych.core.errors import DataError, Problem
from triptych.core.types import ImageReference
from triptych.data.tables import DelimitedRows, parse_json

Row = dict[str, Any]

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
"""File name endings that mark the picture among the members of a webdataset sample."""


class RowSource(Protocol):
    """Rows by number."""

    @property
    def holds_pictures(self) -> bool:
        """Whether the rows hold the pictures themselves, so that reading a row may read its pictures."""
        ...

    def __len__(self) -> int:
        """Number of rows, broken ones included."""
        ...

    def place(self, index: int) -> tuple[str, int]:
        """(file as given in the recipe, 1-based line or row) where row `index` starts. Reads nothing."""
        ...

    def row(self, index: int) -> Row:
        """Read one row.

        Raises:
            DataError: the row is broken; the problem has file and line.
        """
        ...


def open_source(path: Path, name: str) -> RowSource:
    """Open a file, a folder of shards, a Hugging Face data set folder or a glob pattern.

    Args:
        path: where it is.
        name: how messages call it: the spelling in the recipe.

    Raises:
        DataError: nothing is there, the kind is unknown, or a file cannot be cut into rows.
    """
    if path.is_dir():
        return _open_folder(path, name)
    if path.is_file():
        return _open_file(path, name)
    matches = sorted(glob.glob(str(path))) if glob.has_magic(str(path)) else []
    if matches:
        return _concatenate([_open_file(Path(match), match) for match in matches], name)
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    remedy = did_you_mean(path.name, siblings) if siblings else f"the folder {path.parent} does not exist or is empty"
    raise DataError(Problem("data file not found", file=name, remedy=remedy))


def data_files(path: Path, name: str) -> dict[str, Path]:
    """The files that hold the rows `open_source` finds: how messages call each, and where it is."""
    if path.is_file():
        return {name: path}
    if not path.is_dir():
        return {match: Path(match) for match in sorted(glob.glob(str(path)))}
    # One level down are the splits of a saved data set.
    found = sorted(item for item in (*path.iterdir(), *path.glob("*/*.arrow")) if item.suffix.lower() in _DATA_SUFFIXES)
    return {f"{name.rstrip('/')}/{item.relative_to(path)}": item for item in found if item.is_file()}


class JsonRows:
    """JSON objects of a file, each read from its range of bytes when it is asked for."""

    holds_pictures = False

    def __init__(self, path: Path, name: str, spans: Iterable[tuple[int, int, int]]) -> None:
        """Args: the file, how messages call it, and (first byte, byte after the last, line) of each object."""
        self._path, self._name = path, name
        self._spans = np.array(list(spans), dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def place(self, index: int) -> tuple[str, int]:
        return self._name, int(self._spans[index, 2])

    def row(self, index: int) -> Row:
        start, end = (int(byte) for byte in self._spans[index, :2])
        return parse_json(_read_range(self._path, start, end), *self.place(index))


def _json_list(path: Path, name: str) -> JsonRows:
    """A JSON list of objects. Positions come from one pass of the real parser, so they are exact."""
    data = path.read_bytes()
    text = _decode_text(data, name)

    def spans() -> Iterator[tuple[int, int, int]]:
        byte, line, seen = len(data) - len(text.encode()), 1, 0
        for start, end in _list_items(text, json.JSONDecoder(), name):
            first = byte + len(text[seen:start].encode())
            line += text.count("\n", seen, start)
            byte = first + len(text[start:end].encode())
            yield first, byte, line
            line += text.count("\n", start, end)
            seen = end

    return JsonRows(path, name, spans())


def _json_lines(path: Path, name: str) -> JsonRows:
    """One JSON object a line; blank lines are skipped but counted."""

    def spans() -> Iterator[tuple[int, int, int]]:
        position = 0
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                skipped = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                if line[skipped:].strip():
                    yield position + skipped, position + len(line), number
                position += len(line)

    return JsonRows(path, name, spans())


class ArrowRows:
    """Rows of a Hugging Face data set, memory-mapped.

    Bytes in a row, plain or as `{"bytes", "path"}`, become references to their cell, so that no window holds them.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        # The arrow format bypasses the library's feature decoding, which would decode every picture of a row.
        self._table = dataset.with_format("arrow")
        self._name = name
        self.holds_pictures = any("binary" in str(field.type) for field in dataset.features.arrow_schema)

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> tuple[str, int]:
        return self._name, index + 1

    def row(self, index: int) -> Row:
        row: Row = self._table[index].to_pylist()[0]
        return {key: self._refer(value, (index, key)) for key, value in row.items()}

    def read_picture(self, cell: tuple[int | str, ...]) -> bytes:
        """The bytes that `row` left out."""
        row, column, *keys = cell
        value = self._table[row].column(column)[0].as_py()
        for key in keys:
            value = value[key]
        assert isinstance(value, bytes)
        return value

    def _refer(self, value: Any, cell: tuple[int | str, ...]) -> Any:
        if isinstance(value, bytes) and value:
            return ImageReference(name=f"picture bytes of {self._name}:{int(cell[0]) + 1}", rows=self, cell=cell)
        if isinstance(value, list):
            return [self._refer(item, (*cell, number)) for number, item in enumerate(value)]
        if isinstance(value, dict):
            inner = {key: self._refer(item, (*cell, key)) for key, item in value.items()}
            picture = inner.get("bytes")
            if isinstance(picture, ImageReference):
                return replace(picture, name=value.get("path") or picture.name)
            return inner
        return value


class WebdatasetRows:
    """Samples of a plain tar: members that share a path up to the first dot of the file name.

    A row is `{"__key__": path, extension: ..., ...}` with `txt` decoded and `json` parsed; every other member is a
    reference to its bytes in the tar, which are not read here, and nothing in a tar is ever executed.
    """

    holds_pictures = True

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        groups: dict[str, list[tuple[str, int, int]]] = {}
        try:
            # "r:" refuses compressed archives, which have no random access.
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        folder, slash, file = member.name.rpartition("/")
                        stem, _, extension = file.partition(".")
                        entry = (extension.lower(), member.offset_data, member.size)
                        groups.setdefault(folder + slash + stem, []).append(entry)
        except (tarfile.TarError, EOFError, OSError) as error:
            count = sum(len(entries) for entries in groups.values())
            message = f"cannot be read as a plain tar after {count} members: {error}"
            remedy = "fetch the file again if it is incomplete; unpack it if it is compressed"
            raise DataError(Problem(message, file=name, remedy=remedy)) from error
        self._groups = list(groups.items())
        self._file = str(path.resolve())

    def __len__(self) -> int:
        return len(self._groups)

    def place(self, index: int) -> tuple[str, int]:
        return self._name, index + 1

    def row(self, index: int) -> Row:
        key, entries = self._groups[index]
        file, line = self.place(index)
        extensions = [extension for extension, _, _ in entries]
        repeated = sorted({item for item in extensions if extensions.count(item) > 1})
        if repeated:
            message = f"sample `{key}` has more than one member `.{repeated[0]}`"
            raise DataError(Problem(message, file=file, line=line, remedy="write each member once"))
        row: Row = {"__key__": key}
        for extension, start, size in entries:
            if extension not in ("json", "txt"):
                member = f"{key}.{extension}"
                row[extension] = ImageReference(self._file, name=member, offset=start, size=size) if size else b""
                continue
            data = _read_range(self._path, start, start + size)
            if extension == "json":
                row[extension] = parse_json(data, file, line, member=f"{key}.json")
            else:
                row[extension] = _decode_member(data, f"{key}.txt", file, line)
        return row


class ConcatenatedRows:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[RowSource]) -> None:
        self._sources = sources
        self.holds_pictures = any(source.holds_pictures for source in sources)
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[str, int]:
        source, inner = self._locate(index)
        return source.place(inner)

    def row(self, index: int) -> Row:
        source, inner = self._locate(index)
        return source.row(inner)

    def _locate(self, index: int) -> tuple[RowSource, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


def _open_json(path: Path, name: str) -> RowSource:
    """A `.json` file is a list by its first character; many `.json` files hold one object a line instead."""
    with open(path, "rb") as stream:
        head = b""
        while not head.strip() and (chunk := stream.read(4096).removeprefix(b"\xef\xbb\xbf")):
            head = chunk.lstrip()
        if not head.startswith(b"{"):
            return _json_list(path, name)
        stream.seek(0)
        lines = [line for line in itertools.islice(stream, 100) if line.strip()]
    if len(lines) > 1 and all(_is_object(line.removeprefix(b"\xef\xbb\xbf")) for line in lines[:2]):
        return _json_lines(path, name)
    text = _decode_text(path.read_bytes(), name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _syntax_error(error, text, name) from error
    keys = ", ".join(f"`{key}`" for key in itertools.islice(value, 4))
    remedy = "write a JSON list of rows, or one row a line (.jsonl)"
    if any(isinstance(entry, dict) and "annotation" in entry for entry in value.values()):
        remedy = "this is an InternVL index: list its annotation files as data sets, with their `root` as `images:`"
    raise DataError(Problem(f"holds one object (keys {keys}), not rows", file=name, line=1, remedy=remedy))


def _open_parquet(path: Path, name: str) -> RowSource:
    """Parquet has no random access to rows: the `datasets` library copies it once to its memory-mapped cache."""
    import datasets
    import pyarrow

    try:
        return ArrowRows(datasets.Dataset.from_parquet(str(path)), name)
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, OSError, ValueError) as error:
        cause = error.__cause__ or error
        message = f"cannot be read as Parquet: {cause}"
        raise DataError(Problem(message, file=name, remedy="fetch the file again")) from error


_OPENERS: dict[str, Callable[[Path, str], RowSource]] = {
    ".json": _open_json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": DelimitedRows,
    ".tsv": DelimitedRows,
    ".parquet": _open_parquet,
    ".tar": WebdatasetRows,
}


_DATA_SUFFIXES = (*_OPENERS, ".arrow")


def _open_file(path: Path, name: str) -> RowSource:
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        known = ", ".join(_OPENERS)
        message = f"unknown kind of data file `{path.suffix}`"
        raise DataError(Problem(message, file=name, remedy=f"known: {known}, or a Hugging Face data set folder"))
    try:
        source = opener(path, name)
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error}", file=name)) from error
    return _require_rows(source, name)


def _open_folder(path: Path, name: str) -> RowSource:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
        if len(splits) != 1:
            message = f"holds several splits: {', '.join(splits)}"
            remedy = f"name one, e.g. `path: {name.rstrip('/')}/{splits[0]}`" if splits else "save the data set again"
            raise DataError(Problem(message, file=name, remedy=remedy))
        path = path / splits[0]
    if (path / "state.json").is_file():
        import datasets

        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises anything from KeyError to ArrowInvalid for damaged folders
            message = f"cannot be read as a Hugging Face data set: {error}"
            raise DataError(Problem(message, file=name, remedy="save the data set again")) from error
        return _require_rows(ArrowRows(dataset, name), name)
    shards = sorted(item for item in path.iterdir() if item.suffix.lower() in _OPENERS and item.is_file())
    kinds = sorted({shard.suffix.lower() for shard in shards})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "neither shards nor a saved data set"
        remedy = f"name a file, or a pattern such as {name.rstrip('/')}/*.parquet"
        raise DataError(Problem(f"the folder holds {found}", file=name, remedy=remedy))
    return _concatenate([_open_file(shard, f"{name.rstrip('/')}/{shard.name}") for shard in shards], name)


def _concatenate(sources: Sequence[RowSource], name: str) -> RowSource:
    return sources[0] if len(sources) == 1 else _require_rows(ConcatenatedRows(sources), name)


def _require_rows(source: RowSource, name: str) -> RowSource:
    if len(source) == 0:
        raise DataError(Problem("holds no rows", file=name, remedy="drop the data set or fill the file"))
    return source


def _list_items(text: str, decoder: json.JSONDecoder, name: str) -> list[tuple[int, int]]:
    """(start, end) character positions of the items of a JSON list."""
    spans: list[tuple[int, int]] = []
    position = _skip_blank(text, 0)
    try:
        if text[position : position + 1] != "[":
            raise json.JSONDecodeError("Expecting a list of rows", text, position)
        position = _skip_blank(text, position + 1)
        while text[position : position + 1] != "]" or spans:
            _, end = decoder.raw_decode(text, position)
            spans.append((position, end))
            position = _skip_blank(text, end)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
            position = _skip_blank(text, position + 1)
        position = _skip_blank(text, position + 1)
        if position != len(text):
            raise json.JSONDecodeError("Extra data after the list", text, position)
    except (ValueError, RecursionError) as error:
        raise _syntax_error(error, text, name) from error
    return spans


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _syntax_error(error: Exception, text: str, name: str) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return DataError(Problem(f"not valid JSON: {error}", file=name, remedy="mend the file"))
    before = text[: error.pos].rstrip()
    remedy = "mend the syntax there"
    if before.endswith(",") and text[error.pos : error.pos + 1] in ("]", "}"):
        line = before.count("\n") + 1
        remedy = f"remove the comma at the end of line {line}: JSON allows none before `{text[error.pos]}`"
    elif error.pos >= len(text.rstrip()):
        remedy = "the file ends too early: fetch it again"
    message = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    return DataError(Problem(message, file=name, line=error.lineno, remedy=remedy))


def _decode_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 at byte {error.start}: {error.reason}"
        raise DataError(Problem(message, file=name, line=line, remedy="save the file as UTF-8")) from error


def _decode_member(data: bytes, member: str, file: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"member `{member}` is not UTF-8: {error.reason}"
        raise DataError(Problem(message, file=file, line=line, remedy="save it as UTF-8")) from error


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_range(path: Path, start: int, end: int) -> bytes:
    """Open for every read: no shared file position between threads and forked workers."""
    with open(path, "rb") as stream:
        stream.seek(start)
        return stream.read(end - start)
