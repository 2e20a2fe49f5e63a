"""Pytest plugin: ties tests to rows of docs/requirements.md by `@pytest.mark.requirement("A-29", ...)`.

Every collection checks that the rows exist; `--requirements-json FILE` also writes who shows what (see
`tests/requirements_report.py`). A test that is skipped unconditionally shows nothing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "requirements.md"
_ROW = re.compile(r"^\| ([A-Z]-\d+) \| ([^|]+) \|", re.MULTILINE)


def read_rows(document: Path = DOCUMENT) -> dict[str, str]:
    """Row id -> title, in the order of the document.

    Raises:
        pytest.UsageError: the document is missing or names a row twice.
    """
    if not document.is_file():
        raise pytest.UsageError(f"{document} is missing: it lists the rows that tests may name")
    found = _ROW.findall(document.read_text(encoding="utf-8"))
    rows = {row: title.strip() for row, title in found}
    if len(rows) != len(found):
        ids = [row for row, _ in found]
        twice = sorted({row for row in ids if ids.count(row) > 1})
        raise pytest.UsageError(f"{document}: rows listed twice: {', '.join(twice)}")
    return rows


def unknown_rows(item: pytest.Item, rows: Iterable[str]) -> list[str]:
    """One sentence for each id of the test's markers that is no row."""
    known = list(rows)
    complaints = []
    for name in _named(item):
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=2)
            remedy = f"did you mean {' or '.join(close)}?" if close else f"see {DOCUMENT.name}"
            complaints.append(f"{_place(item)}: {item.nodeid} names requirement `{name}`, which is no row; {remedy}")
    return complaints


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--requirements-json", metavar="FILE", help="write which test shows which requirement row")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a wrong id into a collection error of its file, which pytest-xdist reports like any other."""
    report = yield
    marked = [node for node in report.result or [] if isinstance(node, pytest.Item) and _named(node)]
    if marked:
        rows = read_rows()
        complaints = [complaint for item in marked for complaint in unknown_rows(item, rows)]
        if complaints:
            report.outcome, report.longrepr, report.result = "failed", "\n".join(dict.fromkeys(complaints)), []
    return report


@pytest.hookimpl(tryfirst=True)  # before -m and -k take tests away: a slow test shows its rows too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    target = config.getoption("--requirements-json")
    if target:
        entries = [entry for item in items if not item.get_closest_marker("skip") for entry in _entries(item)]
        unique = list({tuple(entry.values()): entry for entry in entries}.values())
        Path(target).write_text(json.dumps(unique, indent=1), encoding="utf-8")


def _entries(item: pytest.Item) -> list[Mapping[str, str | int]]:
    file, line, _ = item.location
    test = item.nodeid.partition("[")[0]
    return [{"row": name, "test": test, "file": file, "line": (line or 0) + 1} for name in dict.fromkeys(_named(item))]


def _named(item: pytest.Item) -> list[str]:
    return [name for marker in item.iter_markers("requirement") for name in marker.args]


def _place(item: pytest.Item) -> str:
    file, line, _ = item.location
    return f"{file}:{(line or 0) + 1}"
