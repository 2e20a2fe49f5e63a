"""Small files are known by content, large ones by size, time and edges."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triptych.data import fingerprint
from triptych.data.fingerprint import fingerprint_file


def test_a_small_file_that_is_only_touched_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    before = fingerprint_file(path)
    os.utime(path, (1, 1))
    assert fingerprint_file(path) == before
    path.write_text("two")
    assert fingerprint_file(path) != before


def test_a_large_file_changes_with_its_time_and_its_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SMALL", 100_000)
    path = tmp_path / "rows.jsonl"
    seen = set()
    for content, time in ((b"a" * 200_000, 1), (b"a" * 200_000, 2), (b"b" + b"a" * 199_999, 1), (b"a" * 199_999, 1)):
        path.write_bytes(content)
        os.utime(path, (time, time))
        assert fingerprint_file(path) == fingerprint_file(path)
        seen.add(fingerprint_file(path))
    assert len(seen) == 4
