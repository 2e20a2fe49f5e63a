"""The page is made of the results and of nothing else, and says plainly where a peer is ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import record, report

MACHINE = "A processor, 2 cores, float32"


def row(name: str, ratio: float, memory: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ours": 2.0,
        "peer": 2.0 * ratio,
        "unit": "seconds a step",
        "peer_name": f"the peer of {name}",
        "peer_kind": "as users run it",
        "ratio": ratio,
        "ours_seconds": [2.0, 2.0, 4.0],
        "peer_seconds": [2.0 * ratio, 2.0 * (ratio - 0.1), 4.0 * (ratio + 0.2)],
        "memory_ratio": memory,
        "n": 3,
        "disturbed": 0,
        "precision": "float32",
        "machine": MACHINE,
        "date": "2026-01-02",
        **more,
    }


def point(axis: str, **more: Any) -> dict[str, Any]:
    base = {"image_tokens": 196, "branches": 4, "batch": 1, "model": "8 x 384"}
    found = {"ours": 1.0, "peer": 3.0, "ours_bytes": 2**30, "peer_bytes": 2**31, "ratio": 3.0, "memory_ratio": 0.5}
    return {
        "axis": axis,
        **base,
        **found,
        "peer_name": "one row a question",
        "parameters": 40_000_000,
        "machine": MACHINE,
        "date": "2026-01-02",
        **more,
    }


RESULT = {
    "machine": MACHINE,
    "rows": [
        row("fast", 2.5, 0.5, target_ratio=2.0, target_memory=0.75),
        row("slow", 0.73, 1.2, target_ratio=0.7, target_memory=0.25, disturbed=2),
        row("missed", 1.2, 0.9, target_ratio=1.5, target_memory=None, date="2026-01-03"),
    ],
    "failed": [{"name": "broken", "error": "exit status -9"}],
    "scaling": [
        point("image_tokens", image_tokens=64, ours=0.5, peer=1.0),
        point("image_tokens"),
        point("image_tokens", image_tokens=2304, ours=9.0, peer=81.0),
        point("branches", branches=1, ratio=1.1),
        point("branches"),
    ],
}


def line_of(page: str, name: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_stand_with_their_targets_and_peers() -> None:
    page = report.page(RESULT, operations={"fast": {"ours": 20, "peer": 45}})
    fast = line_of(page, "fast")
    assert fast[1:11] == ["2", "5", "2.50", "2.40 to 2.70", "2.25", "2", "0.50", "0.75", "3", "float32"]
    assert fast[11] == "the peer of fast (seconds a step; as users run it)"


def test_a_peer_that_is_ahead_and_a_missed_target_are_marked() -> None:
    page = report.page(RESULT)
    assert line_of(page, "slow")[3:10] == [
        "**0.73: the peer is faster**",
        "0.63 to 0.93",
        "-",
        "0.7",
        "**1.20: the peer needs less**",
        "0.25, **missed**",
        "3, 2 disturbed",
    ]
    assert line_of(page, "missed")[3:9] == ["1.20", "1.10 to 1.40", "-", "1.5, **missed**", "0.90", "-"]
    assert "- The peer is faster in: `slow` (0.73)." in page
    assert "- The peer needs less memory in: `slow` (1.20)." in page
    assert "- Targets are missed in: `slow`, `missed`." in page
    assert "- `broken`: exit status -9" in page
    behind = {**RESULT["scaling"][3], "ratio": 0.9, "memory_ratio": 1.05}
    page = report.page({**RESULT, "scaling": [*RESULT["scaling"], behind]})
    assert "- The peer is faster in: `slow` (0.73), Questions about each picture: 1 (0.90)." in page
    assert "- The peer needs less memory in: `slow` (1.20), Questions about each picture: 1 (1.05)." in page


def test_how_long_measuring_took_counts_a_point_on_two_axes_once() -> None:
    rows = [{**row, "seconds": 60 * number} for number, row in enumerate(RESULT["rows"], 1)]
    points = [{**item, "seconds": 120} for item in RESULT["scaling"]]
    distinct = len({tuple(item[axis] for axis in report.AXES) for item in points})
    assert distinct < len(points)
    page = report.page({**RESULT, "rows": rows, "scaling": points})
    assert f"Measured in 6 minutes for rows with a target, {2 * distinct} minutes for how it grows." in page
    assert "Measured in" not in report.page(RESULT)


def test_the_machine_is_named_with_the_rows_that_ran_there() -> None:
    page = report.page(RESULT)
    assert f"- {MACHINE}; 2026-01-02: `fast`, `slow`, how it grows" in page
    assert f"- {MACHINE}; 2026-01-03: `missed`" in page
    assert f"- {MACHINE}; 2026-01-02: the table and how it grows" in report.page({**RESULT, "rows": RESULT["rows"][:2]})


def test_the_scaling_has_a_table_and_a_plot_for_each_axis_measured() -> None:
    page, plots = report.page(RESULT), report.draw(RESULT)
    assert "| 2304 | 9 | 81 | 3.00 | 1024 | 2048 | 0.50 |" in page
    assert "those of 4 questions about each of 1 pictures of 196 tokens" in page
    assert set(plots) == {"ratios.svg", "memory.svg", "image_tokens.svg", "branches.svg"}
    assert all(f"(benchmarks/{name})" in page for name in plots) and page.count(".svg)") == len(plots)


def test_plots_are_drawn_to_scale() -> None:
    plots = report.draw(RESULT)
    pictures = {name: ElementTree.fromstring(text) for name, text in plots.items()}
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(item.attrib["width"]) for item in pictures["ratios.svg"].iter(f"{space}rect")]
    assert widths[1] / widths[0] == pytest.approx(0.73 / 2.5, abs=0.01)
    paths = [item.attrib["d"] for item in pictures["image_tokens.svg"].iter(f"{space}path") if "stroke" in item.attrib]
    assert len(paths) == 4  # ours and the peer's, seconds and memory
    (x1, y1), (x2, y2), (x3, y3) = (map(float, part.split()) for part in paths[1][1:].split(" L"))
    assert x1 < x2 < x3 and (y1 - y3) / (y1 - y2) == pytest.approx((81 - 1) / (3 - 1), rel=0.1)


def test_without_results_the_page_says_so() -> None:
    assert "Nothing was measured yet." in report.page({"machine": "", "rows": []})


def test_the_page_in_the_repository_is_made_of_the_results_in_it() -> None:
    result = record.read()
    assert (report.DOCS / "benchmarks.md").read_text(encoding="utf-8") == report.page(
        result, report.sections(), report.counted()
    )
    folder: Path = report.DOCS / report.PLOTS
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")} == report.draw(result)
