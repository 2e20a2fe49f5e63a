"""`make bench`: Triptych's steps against those of other tools, in turns, in one process a row; medians and ratios.

Writes `benchmarks/results/latest.json`: {"machine", "rows": [{"name", "ours", "peer", "unit", "peer_name", "ratio",
"memory_ratio", "n", ...}], "failed": [{"name", "error", ...}], "scaling": [...]}. A ratio is the median over turns of
the peer's seconds by ours in the same turn; above 1 we are faster. The memory ratio is our added peak over the peer's,
null where only time is compared. Rows that are not measured this time keep their figures, each with its date and
machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, scaling
from benchmarks.models import SCALES
from benchmarks.process import COMMAND, Remote, serve
from benchmarks.record import device, has_bf16, precision
from benchmarks.row import Setting
from benchmarks.table import BESIDE, COMPILED, OTHER_TURNS, PLAIN, ROWS, TARGETS, TURNS
from benchmarks.timing import Timing, Turns, interleave, turn_ratios
from triptych.engine.allocator import ENVIRONMENT, keep_memory

WAYS = ("ours", "peer")
SCALING = "scaling"
"""Beside the names of rows: how time and memory grow."""
ALL_BESIDE = "beside"
"""Stands for `BESIDE`."""
WHOLE = [*(name for name in ROWS if name not in BESIDE), SCALING]
"""What is measured unless something is named."""


def main() -> int:
    """Measure the rows with a target and the scaling, or what is named; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="row",
        help=f"what to measure, such as dpo_196, or dpo_196@360m for models of another size ({', '.join(SCALES)}; "
        f"without one 135m on CPUs and 360m on GPUs); {ALL_BESIDE} stands for {', '.join(BESIDE)}; default: "
        f"{', '.join(WHOLE)}",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed turns of each way; default: as many as end within a time, see benchmarks/table.py",
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [row for name in arguments.rows for row in (BESIDE if name == ALL_BESIDE else [name])]
    unknown = [name for name in names if name not in known_rows()]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join([*ROWS, SCALING, ALL_BESIDE])}")
    if arguments.way:
        be(arguments.way, names[0])
        return 0
    if arguments.one:
        print(json.dumps(scaling.measure(Setting(bf16=has_bf16(), device=device()))))
        return 0

    def measure_one(name: str) -> Any:
        return _measure_scaling() if name == SCALING else measure(name, arguments.repeats)

    folder = record.ON_CUDA if device().type == "cuda" else record.FOLDER
    return run(names or WHOLE, measure_one, folder)


def run(names: Sequence[str], measure_one: Callable[[str], Any], folder: Path = record.FOLDER) -> int:
    """Measure one after another, and write the file after each, so that nothing measured is lost.

    Args:
        measure_one: returns the row (or the points of the scaling), or raises.
        folder: of the results.

    Returns:
        0, or 1 where something failed; what it was is in the file.
    """
    stamp = record.stamp()
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
        result = record.add(record.read(folder), name, found, known_rows())
        record.write({**result, "machine": stamp["machine"]}, folder)
        print(f"{name:24} {_summary(found)}; {seconds:.0f} s in all", flush=True)
    return int(has_failed)


def known_rows() -> list[str]:
    """All names, those of other scales behind their row's."""
    return [*(name for row in ROWS for name in (row, *(f"{row}@{scale}" for scale in SCALES))), SCALING]


def measure(name: str, repeats: int | None) -> dict[str, Any]:
    """One row, each way in a process of its own.

    Args:
        repeats: timed turns; what the table says of the row if None.
    """
    key = name.partition("@")[0]
    environment = ENVIRONMENT if key not in PLAIN and device().type == "cpu" else {}
    with Remote([name, "--way", "ours"], environment) as ours, Remote([name, "--way", "peer"], {}) as peer:
        about, _ = ours.about(), peer.about()
        turns = Turns(repeats, repeats) if repeats else OTHER_TURNS.get(key, TURNS)
        looks_at_memory = about.pop("compares_memory")
        timings = interleave({"ours": ours, "peer": peer}, turns, warm_up=0, looks_at_memory=looks_at_memory)
    return describe(name, about, timings["ours"], timings["peer"])


def be(way: str, name: str) -> None:
    """The process of one way of a row."""
    key, _, scale = name.partition("@")
    if way == "ours" and key not in PLAIN and device().type == "cpu":
        keep_memory()
    scale = scale or ("135m" if device().type == "cpu" else "360m")
    setting = Setting(SCALES[scale], has_bf16(), compiled=key in COMPILED, device=device())
    row = ROWS[key](setting)
    about = {
        "unit": row.unit,
        "peer_name": row.peer_name,
        "peer_kind": row.peer_kind,
        "scale": scale,
        "compares_memory": row.compares_memory,
    }
    chosen = row.ours if way == "ours" else row.peer
    del row  # with the model of the other way
    serve(chosen, about)


def describe(name: str, about: Mapping[str, Any], ours: Timing, peer: Timing) -> dict[str, Any]:
    """What the file says of a row.

    Args:
        about: what the row says of itself: unit, peer_name, peer_kind, scale.
    """
    target = TARGETS.get(name)  # those of other scales have none
    key = name.partition("@")[0]
    return {
        "name": name,
        "ours": ours.median,
        "peer": peer.median,
        **about,
        "compiled": key in COMPILED,
        "memory_kept": key not in PLAIN,
        "ratio": statistics.median(turn_ratios(ours.seconds, peer.seconds)),
        "memory_ratio": ours.added / peer.added if peer.added else None,
        "target_ratio": None if target is None else target.ratio,
        "target_memory": None if target is None else target.memory,
        "ours_bytes": ours.added,
        "peer_bytes": peer.added,
        "ours_seconds": ours.seconds,
        "peer_seconds": peer.seconds,
        "n": len(ours.seconds),
        "disturbed": ours.disturbed + peer.disturbed,
        "precision": precision(),
    }


def _measure_scaling() -> Any:
    """What the command prints last with `--one`: the scaling in one process, so that it has fresh memory.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.run([*COMMAND, SCALING, "--one"], stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"exit status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def _summary(found: Any) -> str:
    if isinstance(found, list):
        return f"{len(found)} points"
    if "error" in found:
        return f"FAILED: {found['error']}"
    memory = "" if found["memory_ratio"] is None else f", {found['memory_ratio']:5.2f} of the memory"
    return f"{found['ours']:8.3f} s against {found['peer']:8.3f} s: {found['ratio']:5.2f} times as fast{memory}"


if __name__ == "__main__":
    sys.exit(main())
