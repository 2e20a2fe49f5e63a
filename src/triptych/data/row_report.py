"""The list of rows that a run left out, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from triptych.core import distributed
from triptych.core.errors import Problem


class RowReport:
    """A JSON Lines file of `{"window", "file", "line", "message"}`, to which all ranks add."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep_before(self, window: int) -> None:
        """Drop the records of `window` and later ones, which are to come (again). Every rank must call this."""
        if distributed.is_main() and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _window(line) < window]
            if kept != lines:
                aside = self._path.with_name(self._path.name + ".new")
                aside.write_text("".join(kept), encoding="utf-8")
                os.replace(aside, self._path)
        distributed.barrier()

    def add(self, window: int, problems: Sequence[Problem]) -> None:
        """Add the problems of the rows that a window lacks."""
        if not problems:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            for problem in problems:
                line = {"window": window, "file": problem.file, "line": problem.line, "message": problem.message}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _window(line: str) -> float:
    """The window of a record; infinity for one that a killed run did not finish."""
    try:
        return int(json.loads(line)["window"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
