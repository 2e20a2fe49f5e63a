"""`python -m tests.requirements_report [--json]`: which rows of docs/requirements.md the tests show.

Collects the tests without running them. Exit code 1 when the collection had errors, whose rows are then missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.requirements_plugin import read_rows

ROOT = Path(__file__).resolve().parents[1]


def collect() -> tuple[list[dict[str, str | int]], str]:
    """Entries (row, test, file, line) of every marked test, and what pytest said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--requirements-json={target}", "tests"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        entries = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else []
    said = result.stdout + result.stderr
    return entries, said[max(said.find("= ERRORS ="), 0) :] if result.returncode else ""


def summary(rows: Mapping[str, str], shown: set[str]) -> list[str]:
    """A line a group, `B 21/23 missing: B-3 B-7`, then `covered 213/360`."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.partition("-")[0], []).append(row)
    lines = []
    for group, members in groups.items():
        missing = [row for row in members if row not in shown]
        line = f"{group} {len(members) - len(missing)}/{len(members)}"
        lines.append(f"{line} missing: {' '.join(missing)}" if missing else line)
    return [*lines, f"covered {len(shown & rows.keys())}/{len(rows)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="requirements_report", description="Rows shown by tests.")
    parser.add_argument("--json", action="store_true", help="list row, test, file and line instead")
    options = parser.parse_args(arguments)
    entries, failure = collect()
    rows = read_rows()
    if options.json:
        order = {row: position for position, row in enumerate(rows)}
        entries.sort(key=lambda entry: (order[str(entry["row"])], str(entry["test"])))
        print(json.dumps(entries, indent=1))
    else:
        print("\n".join(summary(rows, {str(entry["row"]) for entry in entries})))
    if failure:
        print(f"\nthe collection failed; rows may be missing above:\n{failure}", file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
