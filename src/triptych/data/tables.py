"""Delimited tables with random access, and the parsing of one JSON row."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from triptych.core.errors import DataError, Problem


def parse_json(data: bytes, file: str, line: int, member: str = "") -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: its bytes.
        file: file for messages.
        line: 1-based line of `file` where `data` starts.
        member: name of the tar member, when lines count inside it.

    Raises:
        DataError: not UTF-8, not JSON (with line and column), or not an object.
    """
    inside = f" in member `{member}`" if member else ""
    try:
        row = json.loads(data.decode("utf-8-sig").rstrip(), object_pairs_hook=_once)
        if b"\\u" in data:
            # Half of a surrogate pair is valid JSON but no text.
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        message = f"row is not UTF-8 at byte {error.start}{inside}: {error.reason}"
        raise DataError(Problem(message, file=file, line=line, remedy="save the file as UTF-8")) from error
    except json.JSONDecodeError as error:
        place = f"line {line if not member else error.lineno}, column {error.colno}"
        message = f"row is not valid JSON at {place}{inside}: {error.msg}"
        raise DataError(Problem(message, file=file, line=line, remedy="mend or drop the row")) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        message = f"row has half of a surrogate pair (`{half}`){inside}, which is no text"
        raise DataError(Problem(message, file=file, line=line, remedy="mend the escape or drop the row")) from error
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        message = f"row cannot be used{inside}: {error}"
        raise DataError(Problem(message, file=file, line=line, remedy="mend or drop the row")) from error
    except RecursionError as error:
        message = f"row is nested too deeply{inside}"
        raise DataError(Problem(message, file=file, line=line, remedy="mend or drop the row")) from error
    if not isinstance(row, dict):
        kind = "a list" if isinstance(row, list) else "a string" if isinstance(row, str) else f"`{row}`"
        remedy = "unpack it: one object a row" if isinstance(row, list) else "a row is an object of keys and values"
        raise DataError(Problem(f"row is {kind}, not an object{inside}", file=file, line=line, remedy=remedy))
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys each stand once: of two values, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` stands twice")
    return found


class DelimitedRows:
    """Comma- or tab-separated values with a header line; a quoted field may span lines.

    The separator is a tab when the header has one, whatever the file's ending: `.csv` files with tabs are common.
    """

    holds_pictures = False

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        with open(path, "rb") as stream:
            header = stream.readline()
            self._separator = "\t" if b"\t" in header else ","
            self._header = self._parse(header, 1)
            repeated = sorted({item for item in self._header if self._header.count(item) > 1})
            if repeated:
                message = f"the header has column `{repeated[0]}` more than once"
                raise DataError(Problem(message, file=name, line=1, remedy="give every column its own name"))
            self._index(stream, len(header))

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> tuple[str, int]:
        return self._name, self._lines[index]

    def row(self, index: int) -> dict[str, Any]:
        with open(self._path, "rb") as stream:
            stream.seek(self._starts[index])
            data = stream.read(self._ends[index] - self._starts[index])
        line = self._lines[index]
        fields = self._parse(data, line)
        if len(fields) != len(self._header):
            message = f"row has {len(fields)} fields, the header has {len(self._header)}"
            remedy = "quote fields that hold the separator or a line break"
            raise DataError(Problem(message, file=self._name, line=line, remedy=remedy))
        return dict(zip(self._header, fields, strict=True))

    def _index(self, stream: IO[bytes], position: int) -> None:
        """Record where rows start. A row that cannot be cut (an open quote) is kept as its first line alone."""
        line = 2
        while True:
            stream.seek(position)
            consumed: list[bytes] = []
            try:
                # latin-1 maps bytes to characters one to one; only separators, quotes and line ends matter here.
                fields = next(csv.reader(_recorded(stream, consumed), delimiter=self._separator, strict=True), None)
            except csv.Error:
                del consumed[1:]
                fields = ["broken"]
            if fields is None:
                return
            size = sum(map(len, consumed))
            if any(fields) or len(fields) > 1:  # not a blank line
                self._starts.append(position)
                self._ends.append(position + size)
                self._lines.append(line)
            position += size
            line += len(consumed)

    def _parse(self, data: bytes, line: int) -> list[str]:
        try:
            lines = io.StringIO(data.decode("utf-8-sig"), newline="\n")
            # Strict: without it `"a" b` would lose its quotes without a word.
            fields = next(csv.reader(lines, delimiter=self._separator, strict=True), [])
        except UnicodeDecodeError as error:
            message = f"row is not UTF-8: {error.reason}"
            raise DataError(Problem(message, file=self._name, line=line, remedy="save the file as UTF-8")) from error
        except csv.Error as error:
            message = f"row cannot be cut into fields: {error}"
            remedy = 'a field that holds a quote is written "so ""quoted"" here"'
            raise DataError(Problem(message, file=self._name, line=line, remedy=remedy)) from error
        return fields


def _recorded(stream: IO[bytes], consumed: list[bytes]) -> Iterator[str]:
    for line in iter(stream.readline, b""):
        consumed.append(line)
        yield line.decode("latin-1")
