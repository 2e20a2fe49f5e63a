"""`make bench`: Triptych's steps against those of other tools, in turns, in one process a row; medians and ratios.

Writes `benchmarks/results/latest.json`: {"machine", "rows": [{"name", "ours", "peer", "unit", "peer_name", "ratio",
"memory_ratio", "n", ...}], "failed": [{"name", "error", ...}], "scaling": [...]}. A ratio above 1 means that we are
faster; the memory ratio is our added peak over the peer's, null where only time is compared. Rows that are not measured
this time keep their figures, each with its date and machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, scaling
from benchmarks.row import Row, Setting
from benchmarks.table import COMPILED, FEWER_REPEATS, REPEATS, ROWS, TARGETS
from benchmarks.timing import Timing, interleave

SCALING = "scaling"
"""Beside the names of rows: how time and memory grow."""


def main() -> int:
    """Measure all rows and the scaling, or what is named; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"what to measure; default: all of {[*ROWS, SCALING]}")
    parser.add_argument("--repeats", type=int, help="timed turns of each way; default: the row's own number")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.rows if name not in (*ROWS, SCALING)]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join([*ROWS, SCALING])}")
    if arguments.one:
        (name,) = arguments.rows
        repeats = arguments.repeats or FEWER_REPEATS.get(name, REPEATS)
        print(json.dumps(scaling.measure(has_bf16()) if name == SCALING else measure(name, repeats)))
        return 0
    extra = [] if arguments.repeats is None else ["--repeats", str(arguments.repeats)]
    return run(arguments.rows or [*ROWS, SCALING], lambda name: _in_own_process([name, *extra]))


def run(names: Sequence[str], measure_one: Callable[[str], Any], folder: Path = record.FOLDER) -> int:
    """Measure one after another, and write the file after each, so that nothing measured is lost.

    Args:
        measure_one: returns the row (or the points of the scaling), or raises.
        folder: of the results.

    Returns:
        0, or 1 where something failed; what it was is in the file.
    """
    stamp = {"date": record.today(), "machine": record.machine(precision())}
    has_failed = False
    for name in names:
        start = time.monotonic()
        try:
            found = measure_one(name)
        except Exception as error:
            has_failed = True
            found = {"name": name, "error": str(error)}
        seconds = time.monotonic() - start
        if isinstance(found, list):
            found = [{**point, **stamp} for point in found]
        else:
            found = {**found, **stamp, "seconds": round(seconds)}
        result = record.add(record.read(folder), name, found, [*ROWS, SCALING])
        record.write({**result, "machine": stamp["machine"]}, folder)
        print(f"{name:24} {_summary(found)}; {seconds:.0f} s in all", flush=True)
    return int(has_failed)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row, in this process."""
    row = ROWS[name](Setting(bf16=has_bf16(), compiled=name in COMPILED))
    timings = interleave([row.ours, row.peer], repeats)
    return describe(name, row, timings[row.ours.name], timings[row.peer.name])


def describe(name: str, row: Row, ours: Timing, peer: Timing) -> dict[str, Any]:
    """What the file says of a row."""
    target = TARGETS.get(name)
    return {
        "name": name,
        "ours": ours.median,
        "peer": peer.median,
        "unit": row.unit,
        "peer_name": row.peer_name,
        "peer_kind": row.peer_kind,
        "compiled": name in COMPILED,
        "ratio": peer.median / ours.median,
        "memory_ratio": ours.peak / peer.peak if row.compares_memory and peer.peak else None,
        "target_ratio": None if target is None else target.ratio,
        "target_memory": None if target is None else target.memory,
        "ours_bytes": ours.peak,
        "peer_bytes": peer.peak,
        "ours_seconds": ours.seconds,
        "peer_seconds": peer.seconds,
        "n": len(ours.seconds),
        "disturbed": ours.disturbed + peer.disturbed,
        "precision": precision(),
    }


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; where it does not, both ways run in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision() -> str:
    """Of the forward passes of both ways."""
    return "bf16" if has_bf16() else "float32"


def _in_own_process(arguments: Sequence[str]) -> Any:
    """What the same command prints last with `--one`, so that each row has fresh memory.

    Raises:
        RuntimeError: it failed; with the last line it wrote.
    """
    command = [sys.executable, "-m", "benchmarks", *arguments, "--one"]
    last = "it wrote nothing"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        if process.returncode != 0:
            raise RuntimeError(f"exit status {process.returncode}: {last}")
        output.seek(0)
        return json.loads(output.read().splitlines()[-1])


def _summary(found: Any) -> str:
    if isinstance(found, list):
        return f"{len(found)} points"
    if "error" in found:
        return f"FAILED: {found['error']}"
    memory = "" if found["memory_ratio"] is None else f", {found['memory_ratio']:5.2f} of the memory"
    return f"{found['ours']:8.3f} s against {found['peer']:8.3f} s: {found['ratio']:5.2f} times as fast{memory}"


if __name__ == "__main__":
    sys.exit(main())
