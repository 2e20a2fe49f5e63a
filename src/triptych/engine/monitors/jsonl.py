"""A log that programs can read: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from triptych.core import distributed
from triptych.core.config import Config
from triptych.core.types import Progress, StepRecord


class JsonlConfig(Config):
    """Write every step, evaluation and checkpoint to a JSON Lines file."""

    kind: Literal["jsonl"] = "jsonl"
    """Selects this monitor."""
    file: str = "log.jsonl"
    """Name inside the output folder."""


class JsonlMonitor:
    """One line for each step, evaluation and checkpoint, told apart by `event`.

    The state is the length of the file: on resume, lines that a killed run wrote after its last checkpoint are cut off,
    so that the log is that of an uninterrupted run, wall times aside. A number that is not finite becomes the string
    `nan`, `inf` or `-inf`, as JSON has none of them.
    """

    def __init__(self, config: JsonlConfig, output: Path, log_every: int) -> None:
        self._path = output / config.file
        self._stream: TextIO | None = None
        self._length = 0

    def on_start(self, progress: Progress) -> None:
        """Open the log and cut off what belongs to no checkpoint."""
        if not distributed.is_main():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        if self._path.stat().st_size > self._length:
            os.truncate(self._path, self._length)
        self._stream = self._path.open("a", encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        """Write the whole record."""
        values = {name: getattr(record, name) for name in StepRecord.__dataclass_fields__ if name != "progress"}
        self._write("step", record.progress, values)

    def on_evaluation(self, progress: Progress, results: Mapping[str, float]) -> None:
        """Write the results."""
        self._write("evaluation", progress, {"results": results})

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """Write the folder's name."""
        self._write("checkpoint", progress, {"name": path.name})

    def on_end(self, progress: Progress, error: BaseException | None) -> None:
        """Write what stopped the run, if anything did, and close."""
        if error is not None:
            self._write("error", progress, {"kind": type(error).__name__, "message": str(error)})
        if self._stream:
            self._stream.close()
            self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """Length of the file in bytes, after making sure that they are on disk."""
        if self._stream:
            os.fsync(self._stream.fileno())
            self._length = os.fstat(self._stream.fileno()).st_size
        return {"length": self._length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._length = state["length"]

    def _write(self, event: str, progress: Progress, values: Mapping[str, Any]) -> None:
        if self._stream is None:
            return
        line = {"event": event, "step": progress.step, "epoch": progress.epoch, **values}
        self._stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._stream.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
