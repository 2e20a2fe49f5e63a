"""Rows are measured one by one and join those of earlier runs; one that fails takes no other with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.process import Remote
from benchmarks.row import WRITTEN_AGAIN
from benchmarks.table import OTHER_TURNS, ROWS, TARGETS, TURNS
from benchmarks.timing import Timing

from benchmarks import __main__ as command
from benchmarks import record
from triptych.engine.allocator import LARGE_PAGES


def row(name: str, ratio: float = 2.0) -> dict[str, Any]:
    return {"name": name, "ours": 1.0, "peer": ratio, "ratio": ratio}


def test_a_measured_row_takes_its_place_and_others_keep_their_figures() -> None:
    before = {"machine": "old", "rows": [row("b"), row("gone"), row("a")]}
    after = record.add(before, "b", {**row("b", 3.0), "machine": "new", "date": "2026-01-02"}, ["a", "b", "c"])
    assert [(item["name"], item["ratio"], item["machine"]) for item in after["rows"]] == [
        ("a", 2.0, "old"),
        ("b", 3.0, "new"),
    ]
    assert after["failed"] == [] and after["scaling"] == []


def test_a_failure_takes_the_place_of_the_figures_and_goes_with_the_next_success() -> None:
    before = {"machine": "", "rows": [row("a"), row("b")], "scaling": [{"axis": "batch"}]}
    failed = record.add(before, "a", {"name": "a", "error": "no memory"}, ["a", "b"])
    assert [item["name"] for item in failed["rows"]] == ["b"]
    assert failed["failed"] == [{"name": "a", "error": "no memory"}]
    assert failed["scaling"] == [{"axis": "batch"}]
    again = record.add(failed, "a", row("a"), ["a", "b"])
    assert [item["name"] for item in again["rows"]] == ["a", "b"] and again["failed"] == []


def test_a_list_is_the_scaling() -> None:
    before = {"machine": "", "rows": [row("a")], "failed": [{"name": "scaling", "error": "x"}], "scaling": [{"old": 1}]}
    after = record.add(before, "scaling", [{"axis": "batch"}], ["a", "scaling"])
    assert after["scaling"] == [{"axis": "batch"}] and after["failed"] == [] and len(after["rows"]) == 1


def test_a_failing_row_loses_no_other_and_is_told_by_the_exit_status(tmp_path: Path) -> None:
    latest = tmp_path / record.LATEST
    first, second, third = list(ROWS)[:3]

    def measure(name: str) -> Any:
        if name == second:
            raise RuntimeError("exit status 1: MemoryError")
        return [{"axis": "batch", "batch": 1}] if name == command.SCALING else {**row(name), "memory_ratio": 0.5}

    assert command.run([third, second, first, command.SCALING], measure, tmp_path) == 1
    result = json.loads(latest.read_text())
    assert [item["name"] for item in result["rows"]] == [first, third]
    assert all(item["date"] == record.today() and "torch" in item["machine"] for item in result["rows"])
    (failed,) = result["failed"]
    assert (failed["name"], failed["error"]) == (second, "exit status 1: MemoryError")
    assert result["scaling"][0]["batch"] == 1 and result["machine"] == result["scaling"][0]["machine"]
    assert (tmp_path / f"{record.today()}.json").read_text() == latest.read_text()
    assert command.run([first], measure, tmp_path) == 0
    assert json.loads(latest.read_text())["failed"] == result["failed"]


def test_the_last_line_of_a_process_that_fails_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "no_such_row"])
    with pytest.raises(SystemExit):
        command.main()
    with Remote(["no_such_row"], {}) as process, pytest.raises(RuntimeError, match=r"exit status 2: .*no row no_such"):
        process.about()


def test_a_way_has_a_process_of_its_own_with_its_own_environment() -> None:
    with Remote(["loader_vqa", "--way", "peer"], LARGE_PAGES) as process:
        about = process.about()
        step, added = process.take(), process.look_at_memory()
        assert about["unit"] == "seconds for 64 pictures" and not about["compares_memory"] and about["scale"] == "135m"
        assert step.seconds > 0 and added > 0


def test_a_row_says_what_it_should_reach_and_of_what_kind_its_peer_is() -> None:
    about = {"unit": "s", "peer_name": "a peer", "peer_kind": WRITTEN_AGAIN, "scale": "135m"}
    found = command.describe("dpo_196", about, Timing([1.0, 2.0, 4.0], 20), Timing([6.0, 5.0, 7.0], 40))
    assert (found["ours"], found["peer"], found["memory_ratio"], found["n"]) == (2.0, 6.0, 0.5, 3)
    assert found["ratio"] == 2.5  # the median of 6, 2.5 and 1.75, and not the ratio of the medians
    assert (found["target_ratio"], found["target_memory"], found["peer_kind"]) == (2.4, 0.75, WRITTEN_AGAIN)
    other = command.describe("dpo_196@7b", about, Timing([1.0]), Timing([2.0]))
    assert other["compiled"] and other["target_ratio"] is None and other["memory_ratio"] is None


def test_a_whole_run_leaves_out_the_rows_beside_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(command, "run", lambda names, *rest: asked.extend(names) or 0)
    for arguments, expected in (
        ([], [*TARGETS, command.SCALING]),
        (["beside", "dpo_196"], [*(name for name in ROWS if name not in TARGETS), "dpo_196"]),
    ):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        assert command.main() == 0 and asked == expected


def test_slow_rows_exist_and_are_measured_twice_at_least() -> None:
    assert set(OTHER_TURNS) <= set(ROWS) and min(turns.least for turns in (TURNS, *OTHER_TURNS.values())) >= 2
    known = [name for name in TARGETS if name in ROWS]
    assert list(ROWS)[: len(known)] == known


def test_a_result_says_when_and_on_what_it_was_measured() -> None:
    stamp = record.stamp()
    assert stamp["date"] == record.today() and "torch" in stamp["machine"]
    assert record.measured({**stamp, "rows": []}) == f"Measured on {stamp['date']}: {stamp['machine']}."
    assert record.measured({"rows": []}) == "When and on what was not noted."
