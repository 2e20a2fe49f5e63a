"""What settings of the memory allocator and of threads do to a training step on CPUs.

They are read when a process starts, so each setting has a process of its own; the processes take their steps in turns,
while the others sleep. Writes `benchmarks/results/allocator.json`.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from benchmarks import record
from benchmarks.models import FULL, make_example
from benchmarks.process import Remote
from benchmarks.timing import wait_until_quiet
from triptych.core.types import Example
from triptych.data.collate import collate
from triptych.engine.allocator import LARGE_PAGES, keep_memory

RESULT = record.FOLDER / "allocator.json"
TURNS = 7
LAYERS = 15
"""Of the language model: half of SmolLM2-135M's, so that all processes fit into memory side by side."""
KEEP = "memory kept"
"""Begins the names of settings under which `triptych.engine.allocator` is at work."""
ADOPTED = f"{KEEP}, torch's huge pages"
"""As `triptych train` runs."""
_GLIBC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "plain": {},
    "torch's huge pages": LARGE_PAGES,
    KEEP: {},
    ADOPTED: LARGE_PAGES,
    f"{KEEP}, glibc's huge pages": _GLIBC,
    "threads bound": {"OMP_PROC_BIND": "true"},
}


def main() -> None:
    """Measure all settings in turns, or be the process of one."""
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2])
        return
    names = sys.argv[1:] or list(SETTINGS)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Remote(["--worker", name], SETTINGS[name], "benchmarks.allocator"))
            for name in names
        }
        for turn in range(TURNS + 1):
            for name in names if turn % 2 == 0 else reversed(names):
                wait_until_quiet()
                answer = workers[name].ask("step")
                if turn > 0:
                    found[name].append(answer)
    rows = [_describe(name, found[name], found[names[0]]) for name in names]
    RESULT.write_text(json.dumps({**record.stamp(), "rows": rows, "turns": TURNS}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['name']:32} {row['seconds']:6.2f} s {row['times_as_fast']:5.2f} "
            f"{row['resident_peak'] / 2**20:7.0f} MiB {row['faults']:9.0f} page faults"
        )


def _describe(name: str, answers: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    middle = {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}
    return {
        "name": name,
        "environment": SETTINGS[name],
        **middle,
        "all_seconds": [answer["seconds"] for answer in answers],
        # pair by pair: the machine's speed wanders from turn to turn, the same for all
        "times_as_fast": statistics.median(
            other["seconds"] / answer["seconds"] for answer, other in zip(answers, first, strict=True)
        ),
    }


def serve(name: str) -> None:
    """Take a step for each line of the standard input; write what it cost."""
    if name.startswith(KEEP):
        keep_memory()
    from benchmarks import ours
    from benchmarks.row import Setting
    from benchmarks.rows import prepare, training_way, with_pixels

    setting = Setting(replace(FULL, language={**FULL.language, "num_hidden_layers": LAYERS}))
    batches = itertools.cycle(_batches())
    scorer, batch, _ = prepare(setting, 196, next(batches))
    way = training_way("ours", scorer.hf, setting, lambda: ours.supervised(scorer, batch))
    assert way.optimizer is not None
    for _ in sys.stdin:
        batch = with_pixels(setting, 196, collate(next(batches)))
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        way.model.zero_grad(set_to_none=True)
        way.run()
        way.optimizer.step()
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        answer = {
            "seconds": seconds,
            "resident_peak": after.ru_maxrss * 1024,
            "faults": after.ru_minflt - before.ru_minflt,
            "system_seconds": after.ru_stime - before.ru_stime,
        }
        print(json.dumps(answer), flush=True)


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown, for docs/benchmarks.md."""
    lines = [
        "## Settings of the allocator and of threads",
        "",
        f"Full tuning of half of SmolLM2-135M's layers with micro-batches of changing shapes, one process for each "
        f"setting, {result['turns']} turns in which they take a step one after the other; times as fast as the first "
        "in the same turn, medians. Unlike in the table above, nothing is given back to the system between steps. "
        "`triptych train` runs as in the line in bold. `python -m benchmarks.allocator` writes this. "
        f"{record.measured(result)}",
        "",
        "| setting | environment | seconds a step | times as fast | resident peak, MiB | page faults a step |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [
            f"**{row['name']}**" if row["name"] == ADOPTED else str(row["name"]),
            " ".join(f"`{key}={value}`" for key, value in row["environment"].items()) or "-",
            f"{row['seconds']:.2f}",
            f"{row['times_as_fast']:.2f}",
            f"{row['resident_peak'] / 2**20:.0f}",
            f"{row['faults']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _batches() -> list[list[Example]]:
    """Micro-batches of unlike shapes, as training has them: blocks of one do not fit the next."""
    generator = torch.Generator().manual_seed(1)
    return [
        [make_example(n, n, 196, question, [24 * (n + 1)], generator) for n in range(rows)]
        for rows, question in ((4, 24), (3, 80), (4, 11), (2, 200), (3, 37))
    ]


if __name__ == "__main__":
    main()
