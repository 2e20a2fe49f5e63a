"""`make bench`: Triptych's steps against those of other tools, in turns, in one process a row; medians and ratios.

Writes `benchmarks/results/latest.json`: {"machine", "rows": [{"name", "ours", "peer", "unit", "peer_name", "ratio",
"memory_ratio", "n"}]}. A ratio above 1 means that we are faster; the memory ratio is our added peak over the
peer's, null where only time is compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.row import Setting
from benchmarks.rows import ROWS
from benchmarks.timing import interleave

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure all rows, or those named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="rows to measure; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each way")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.rows[0], arguments.repeats)))
        return
    rows = []
    for name in arguments.rows or ROWS:
        command = [sys.executable, "-m", "benchmarks", name, "--one", "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(rows[-1]), flush=True)
    write({"machine": machine(), "rows": rows})


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row, in this process."""
    setting = Setting(bf16=has_bf16())
    row = ROWS[name](setting)
    timings = interleave([row.ours, row.peer], repeats)
    ours, peer = timings[row.ours.name], timings[row.peer.name]
    return {
        "name": name,
        "ours": ours.median,
        "peer": peer.median,
        "unit": row.unit,
        "peer_name": row.peer_name,
        "ratio": peer.median / ours.median,
        "memory_ratio": ours.peak / peer.peak if row.compares_memory else None,
        "ours_bytes": ours.peak,
        "peer_bytes": peer.peak,
        "n": repeats,
        "disturbed": ours.disturbed + peer.disturbed,
        "precision": "bf16" if setting.bf16 else "float32",
    }


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; where it does not, both ways run in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def machine() -> str:
    """What the figures were measured on."""
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write(result: dict[str, Any]) -> None:
    """Write the file, and a copy of the day."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    for name in ("latest.json", f"{day}.json"):
        (RESULTS / name).write_text(text, encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    memory = "" if row["memory_ratio"] is None else f", {row['memory_ratio']:5.2f} of the memory"
    return (
        f"{row['name']:20} {row['ours']:8.3f} s against {row['peer']:8.3f} s: {row['ratio']:5.2f} times as fast{memory}"
    )


if __name__ == "__main__":
    main()
