"""`python -m benchmarks.report`: docs/benchmarks.md and its plots from the files in `results` and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks import allocator, figures, products, questions, record
from benchmarks.models import VOCABULARY
from benchmarks.record import Result
from benchmarks.timing import QUIET, turn_ratios

DOCS = Path(__file__).parent.parent / "docs"
PLOTS = "benchmarks"
"""Folder of the plots beside the page."""

AXES: Mapping[str, tuple[str, str]] = {
    "image_tokens": ("Tokens of a picture", "tokens of a picture"),
    "branches": ("Questions about each picture", "questions a picture"),
    "batch": ("Pictures in a step", "pictures"),
    "model": ("Size of the model", "million parameters"),
}
"""Axis of the scaling -> (heading, name of the numbers)."""

INTRODUCTION = f"""\
<!-- Written by `python -m benchmarks.report` from the files in benchmarks/results: change those, not this. -->
# Benchmarks

Both ways take the same step of the same model, with fused AdamW, in turns: each has a process of its own, which sleeps
while the other takes its step. Before each timed step the command waits until others use less than {QUIET:.0%} of the
processors, for a minute at most; steps measured in spite of them, or during which they began, are counted as disturbed.
Seconds are medians. How many times as fast we are is the median over turns of the peer's seconds by ours in the same
turn, since what slows the machine for longer than a step slows both; the lowest and the highest turn stand beside it.
Memory is what one more step adds, which is not timed: resident memory, looked at every 10 ms, less that before the
step, when free memory is given back, gradients are freed and the optimizer's state exists. A ratio above 1 means that
we are faster; a share of memory below 1 means that we need less. That both ways compute the same loss and gradients (or
tokens) is tested for every row.

Models have random weights and real shapes: SmolLM2-135M behind a tower of 22 million parameters that rests, unless a
row says otherwise. **Its vocabulary of {VOCABULARY:,} words is large for its size, which inflates what is won by
computing logits of learned positions only; a model of 7 billion parameters wins less by that.** A peer is either run
as users run it, or, where its path on CPUs does more than the one on GPUs, its GPU algorithm is written again. Where
our time says "compiled", our blocks are compiled (`train.runtime.compile`, off unless asked for: the first step of a
run takes a minute more); peers are not, as their users mostly run them. Our processes keep freed memory and ask for
large pages, as `triptych train` does on CPUs (the last section); peers' are as their users start them.
`sft_full_196_eager` is the first row without either: what the algorithm alone wins.

In the rows of preferences our reference's log-probabilities were computed before training, once for each pair, and the
frozen tower's features kept from then, as a run does by itself. That pass is not in our time: it is spread over the
epochs of a run. `dpo_196_one_epoch` has it in every step, as a run of a single epoch pays it.

"Products" is how many times as many operations the peer's linear layers take in a step (counted by
`python -m benchmarks.products`, attention left out): what would be won if products were all there is. On CPUs without
bf16 they are three quarters of a step.

Run it with `make bench`, which leaves out the rows without a target (`make bench ARGUMENTS=beside`), or with names for
a part (`make bench ARGUMENTS="sft_full_196 scaling"`): rows that are not measured keep their figures. Leave the machine
alone meanwhile.
"""


def main() -> None:
    """Write the page and its plots."""
    result = record.read()
    plots = draw(result)
    folder = DOCS / PLOTS
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, text in plots.items():
        (folder / name).write_text(text, encoding="utf-8")
    (DOCS / "benchmarks.md").write_text(page(result, sections(), counted()), encoding="utf-8")


def sections() -> list[str]:
    """What other commands than `make bench` measured, one section each."""
    found = ((questions.RESULT, questions.section), (allocator.RESULT, allocator.section))
    return [section(json.loads(path.read_text(encoding="utf-8"))) for path, section in found if path.is_file()]


def counted() -> Result:
    """What `benchmarks.products` counted."""
    found: Result = json.loads(products.RESULT.read_text(encoding="utf-8")) if products.RESULT.is_file() else {}
    return found


def page(result: Result, more: Sequence[str] = (), operations: Mapping[str, Result] = MappingProxyType({})) -> str:
    """The page in Markdown.

    Args:
        more: sections for its end.
        operations: row -> those of both ways, see `benchmarks.products`.
    """
    rows, points = result["rows"], result.get("scaling", [])
    parts = [INTRODUCTION, _machines([*rows, *points])]
    if rows:
        parts += [
            _verdict(rows, points),
            _table(rows, operations),
            _image("ratios", "Times as fast as the peer, row by row"),
        ]
        parts += [_image("memory", "The peer's added memory over ours, row by row"), _minutes(rows, points)]
    if failed := result.get("failed"):
        lines = [f"- `{item['name']}`: {item['error']}" for item in failed]
        parts.append("\n".join(["**Failed, and so without figures:**", "", *lines, ""]))
    if points:
        parts.append(
            f"## How it grows\n\nFull tuning with questions about pictures, through trees (ours) against "
            f"{points[0]['peer_name']}. One number is varied at a time; the others are those of {_base(points)}. That "
            "model is small, so that all points take minutes.\n"
        )
        parts += [_axis(axis, points) for axis in AXES if any(point["axis"] == axis for point in points)]
    return "\n".join([*parts, *more])


def draw(result: Result) -> dict[str, str]:
    """Name of a file -> SVG, for all plots that the page shows."""
    plots = {}
    rows = result["rows"]
    if rows:
        ratios = [(row["name"], row["ratio"], row.get("target_ratio")) for row in rows]
        plots["ratios.svg"] = figures.bars("Times as fast as the peer (mark: target)", ratios)
        shares = [
            (row["name"], 1 / row["memory_ratio"], 1 / row["target_memory"] if row.get("target_memory") else None)
            for row in rows
            if row.get("memory_ratio")
        ]
        plots["memory.svg"] = figures.bars("The peer's added memory over ours (mark: target)", shares)
    for axis, (heading, unit) in AXES.items():
        points = [point for point in result.get("scaling", []) if point["axis"] == axis]
        if points:
            charts = [
                figures.chart("seconds a step", _curves(points, "ours", "peer", 1.0)),
                figures.chart("added memory in GiB", _curves(points, "ours_bytes", "peer_bytes", 2.0**30)),
            ]
            plots[f"{axis}.svg"] = figures.curves(heading, unit, charts)
    return plots


def _curves(points: Sequence[Result], ours: str, peer: str, unit: float) -> list[tuple[str, figures.Points]]:
    """Both curves of a chart from the keys that hold their values."""
    return [(name, [(_x(item), item[key] / unit) for item in points]) for name, key in (("ours", ours), ("peer", peer))]


def _base(points: Sequence[Result]) -> str:
    """The point that lies on several axes: what is not varied."""
    seen: dict[tuple[object, ...], int] = {}
    for item in points:
        key = tuple(item[axis] for axis in AXES)
        seen[key] = seen.get(key, 0) + 1
    tokens, branches, batch, model = max(seen, key=lambda key: seen[key])
    layers, _, width = str(model).partition(" x ")
    return (
        f"{branches} questions about each of {batch} pictures of {tokens} tokens, and of a language model of {layers} "
        f"layers of width {width}"
    )


def _x(point: Result) -> float:
    """Where a point stands on its axis."""
    return round(point["parameters"] / 1e6) if point["axis"] == "model" else point[point["axis"]]


def _machines(items: Sequence[Result]) -> str:
    """What was measured where and when."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for item in items:
        key = item.get("machine", ""), item.get("date", "an unknown day")
        groups.setdefault(key, {})[f"`{item['name']}`" if "name" in item else "how it grows"] = None
    lines = [
        f"- {machine}; {date}: {', '.join(names) if len(groups) > 1 else 'the table and how it grows'}"
        for (machine, date), names in groups.items()
    ]
    return "\n".join(["Measured on:", "", *lines, ""]) if lines else "Nothing was measured yet.\n"


def _verdict(rows: Sequence[Result], points: Sequence[Result]) -> str:
    """Where the peer is ahead, and which targets are missed, before the table."""
    slower = [f"`{row['name']}` ({row['ratio']:.2f})" for row in rows if row["ratio"] < 1]
    larger = [f"`{row['name']}` ({row['memory_ratio']:.2f})" for row in rows if (row["memory_ratio"] or 0) > 1]
    for point in points:
        name = f"{AXES[point['axis']][0]}: {point[point['axis']]}"
        slower += [f"{name} ({point['ratio']:.2f})"] if point["ratio"] < 1 else []
        larger += [f"{name} ({point['memory_ratio']:.2f})"] if point["memory_ratio"] > 1 else []
    missed = [f"`{row['name']}`" for row in rows if _misses_time(row) or _misses_memory(row)]
    lines = [
        f"- The peer is faster in: {', '.join(slower) or 'nothing'}.",
        f"- The peer needs less memory in: {', '.join(larger) or 'nothing'}.",
        f"- Targets are missed in: {', '.join(missed) or 'no row'}.",
    ]
    return "\n".join(["## The table", "", *lines, ""])


def _minutes(rows: Sequence[Result], points: Sequence[Result]) -> str:
    """How long measuring took."""
    distinct = {tuple(item[axis] for axis in AXES): item.get("seconds", 0) for item in points}
    parts = (
        ("rows with a target", sum(row.get("seconds", 0) for row in rows if row.get("target_ratio"))),
        ("other rows", sum(row.get("seconds", 0) for row in rows if not row.get("target_ratio"))),
        ("how it grows", sum(distinct.values())),
    )
    known = [f"{seconds / 60:.0f} minutes for {name}" for name, seconds in parts if seconds]
    return f"Measured in {', '.join(known)}.\n" if known else ""


def _products(name: str, operations: Mapping[str, Result]) -> str:
    found = operations.get(name)
    return "-" if found is None else f"{found['peer'] / found['ours']:.2f}"


def _table(rows: Sequence[Result], operations: Mapping[str, Result]) -> str:
    lines = [
        "| row | ours | peer | times as fast | lowest to highest | products | target | memory | target | n | precision "
        "| against |",
        f"| --- |{' ---: |' * 9} --- | --- |",
    ]
    for row in rows:
        count = f"{row['n']}, {row['disturbed']} disturbed" if row.get("disturbed") else f"{row['n']}"
        turns = turn_ratios(row["ours_seconds"], row["peer_seconds"])
        cells = [
            f"`{row['name']}`",
            f"{row['ours']:.3g}" + (" (compiled)" if row.get("compiled") else ""),
            f"{row['peer']:.3g}",
            f"{row['ratio']:.2f}" if row["ratio"] >= 1 else f"**{row['ratio']:.2f}: the peer is faster**",
            f"{min(turns):.2f} to {max(turns):.2f}",
            _products(row["name"], operations),
            _target(row.get("target_ratio"), _misses_time(row)),
            _share(row["memory_ratio"]),
            _target(row.get("target_memory"), _misses_memory(row)),
            count,
            row.get("precision", ""),
            _peer(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _peer(row: Result) -> str:
    notes = [row["unit"], *([row["peer_kind"]] if "peer_kind" in row else [])]
    return f"{row['peer_name']} ({'; '.join(notes)})"


def _share(memory_ratio: float | None) -> str:
    if memory_ratio is None:
        return "-"
    return f"{memory_ratio:.2f}" if memory_ratio <= 1 else f"**{memory_ratio:.2f}: the peer needs less**"


def _target(target: float | None, is_missed: bool) -> str:
    if target is None:
        return "-"
    return f"{target:g}, **missed**" if is_missed else f"{target:g}"


def _misses_time(row: Result) -> bool:
    return row.get("target_ratio") is not None and row["ratio"] < row["target_ratio"]


def _misses_memory(row: Result) -> bool:
    return row.get("target_memory") is not None and (row["memory_ratio"] or 0) > row["target_memory"]


def _axis(axis: str, points: Sequence[Result]) -> str:
    heading, unit = AXES[axis]
    lines = [
        f"### {heading}",
        "",
        f"| {unit} | ours, s | peer, s | times as fast | ours, MiB | peer, MiB | memory |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for point in points:
        if point["axis"] == axis:
            cells = [
                f"{_x(point):g} ({point['model']})" if axis == "model" else f"{_x(point):g}",
                f"{point['ours']:.3g}",
                f"{point['peer']:.3g}",
                f"{point['ratio']:.2f}",
                f"{point['ours_bytes'] / 2**20:.0f}",
                f"{point['peer_bytes'] / 2**20:.0f}",
                f"{point['memory_ratio']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _image(axis, f"{heading}: seconds and memory, ours and the peer's")])


def _image(name: str, text: str) -> str:
    return f"![{text}]({PLOTS}/{name}.svg)\n"


if __name__ == "__main__":
    main()
