"""Helpers: write rows to a file, open it as a recipe would, read a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from triptych.core.types import ImageReference, Message, Sample
from triptych.data.formats import Dataset, DatasetConfig, open_dataset

ADAPTER: TypeAdapter[Any] = TypeAdapter(DatasetConfig)


def picture(folder: Path, *names: str) -> None:
    """Write a small picture under each name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), "red").save(path)


def open_rows(folder: Path, format: str, *rows: Any, **config: Any) -> Dataset:
    """Write rows as JSON Lines and open them."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return open_file(folder, format, "rows.jsonl", **config)


def open_file(folder: Path, format: str, name: str, **config: Any) -> Dataset:
    """Open a file of `folder`."""
    return open_dataset(ADAPTER.validate_python({"format": format, "path": name, **config}), folder)


def read(folder: Path, format: str, row: Any, **config: Any) -> Sample:
    """The sample of a single row."""
    return open_rows(folder, format, row, **config).sample(0)


def shape(messages: tuple[Message, ...]) -> list[tuple[str, list[str]]]:
    """(role, parts) of each turn; pictures as `[name]` by file name."""
    return [(message.role, [_show(part) for part in message.parts]) for message in messages]


def _show(part: Any) -> str:
    if isinstance(part, ImageReference):
        return f"[{Path(part.path).name if part.path else 'bytes'}]"
    return str(part.text)
