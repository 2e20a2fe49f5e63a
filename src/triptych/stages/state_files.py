"""Small files of a run that others read later, written whole or not at all: what was decided or measured, recipes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from triptych.core.errors import CheckpointError


def write_state(file: Path, values: Mapping[str, Any]) -> None:
    """Write plain values, whole or not at all."""
    write_whole(file, json.dumps(values, indent=1) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a text, whole or not at all; a file that is there stays as it was if that fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def read_state(file: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """The values of these names that `write_state` wrote; None where there is no such file.

    Raises:
        CheckpointError: it holds something else.
    """
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            if values.keys() >= (expected := set(names)):
                return {name: values[name] for name in expected}
            found = f"it lacks {', '.join(sorted(expected - values.keys()))}"
        else:
            found = f"it holds a {type(values).__name__}"
    except ValueError as error:
        found = str(error)
    raise CheckpointError(
        f"the file is damaged: {found}",
        file=str(file),
        remedy="delete it, and what it says is decided or measured anew: the run may go on with other roundings",
    )
