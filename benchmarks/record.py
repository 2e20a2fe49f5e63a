"""The file of results: measured rows join those of earlier runs."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

FOLDER = Path(__file__).parent / "results"
LATEST = "latest.json"
ON_CUDA = FOLDER / "cuda"
"""Results of GPUs have files of their own."""

Result = dict[str, Any]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16() -> bool:
    """Whether the device multiplies bf16 itself; where it does not, both ways run in float32."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision() -> str:
    """Of the forward passes of both ways."""
    return "bf16" if has_bf16() else "float32"


def stamp() -> dict[str, str]:
    """Date and machine, as every result has them."""
    return {"date": today(), "machine": machine()}


def measured(result: Mapping[str, Any]) -> str:
    """A sentence that says when and on what a result was measured."""
    if "machine" not in result:
        return "When and on what was not noted."
    return f"Measured on {result['date']}: {result['machine']}."


def machine() -> str:
    """What is measured on here, in one line."""
    if device().type == "cuda":
        return f"{torch.cuda.get_device_name(device())}, torch {torch.__version__}, {precision()}"
    cores, memory = psutil.cpu_count(logical=True), psutil.virtual_memory().total / 2**30
    return (
        f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB, "
        f"torch {torch.__version__}, {precision()}"
    )


def today() -> str:
    """The date in UTC, such as 2026-01-31."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def read(folder: Path = FOLDER) -> Result:
    """The results of earlier runs; none where there is no file."""
    path = folder / LATEST
    if not path.is_file():
        return {"machine": "", "rows": []}
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def add(before: Result, name: str, found: Result | list[Result], order: Sequence[str]) -> Result:
    """Earlier results, and what was found under a name in its place.

    Args:
        before: what `read` returned.
        found: a measured row, {"name", "error", ...} of one that failed, or a list, which is the scaling. A row that
            failed loses its earlier figures, which the dated copies keep.
        order: names of all rows there are; rows of other names are dropped.
    """
    rows = {row["name"]: {"machine": before["machine"], **row} for row in before["rows"]}
    failed = {row["name"]: row for row in before.get("failed", [])}
    scaling = before.get("scaling", [])
    for known in (rows, failed):
        known.pop(name, None)
    if isinstance(found, list):
        scaling = found
    else:
        (failed if "error" in found else rows)[name] = found
    return {
        "machine": before["machine"],
        "rows": [rows[key] for key in order if key in rows],
        "failed": [failed[key] for key in order if key in failed],
        "scaling": scaling,
    }


def write(result: Result, folder: Path = FOLDER) -> None:
    """Write the file, and a copy of the day."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    for name in (LATEST, f"{today()}.json"):
        (folder / name).write_text(text, encoding="utf-8")


def _processor() -> str:
    """The model's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
