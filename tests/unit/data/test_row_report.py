"""The list of rows left out is that of an uninterrupted run."""

from __future__ import annotations

import json
from pathlib import Path

from triptych.core.errors import Problem
from triptych.data.row_report import RowReport


def test_records_of_windows_to_come_again_and_unfinished_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rows.jsonl"
    report = RowReport(path)
    report.keep_before(3)
    report.add(0, [])
    assert not path.exists()
    for window in (0, 1, 1, 2):
        report.add(window, [Problem("broken", file="ü.jsonl", line=window)])
    with path.open("a") as stream:
        stream.write('{"window": 0, "fi')
    report.keep_before(2)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["window"] for line in lines] == [0, 1, 1]
    assert lines[0] == {"window": 0, "file": "ü.jsonl", "line": 0, "message": "broken"}
    report.keep_before(0)
    assert path.read_text() == ""
