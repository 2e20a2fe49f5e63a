"""The list of requirement rows and the plugin that ties tests to them."""

import json
import re
import subprocess
import sys

import pytest

from tests.architecture.source import PACKAGE, ROOT, listing
from tests.requirements_plugin import DOCUMENT, read_rows
from tests.requirements_report import main, summary

GROUPS = {
    "A": 44,
    "B": 23,
    "C": 14,
    "D": 25,
    "E": 42,
    "F": 34,
    "G": 22,
    "H": 38,
    "I": 19,
    "J": 30,
    "K": 40,
    "L": 20,
    "M": 9,
}


def collect(folder, source, *arguments):
    (folder / "test_sample.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={folder}", "-q"]
    return subprocess.run(
        [*command, "--collect-only", *arguments, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_rows_are_numbered_without_gaps():
    assert list(read_rows()) == [
        f"{group}-{number}" for group, count in GROUPS.items() for number in range(1, count + 1)
    ]
    assert len(read_rows()) == 360


def test_every_row_has_a_title_and_four_cells():
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if re.match(r"\| [A-M]-\d+ ", line)]
    assert len(lines) == 360
    assert [line for line in lines if line.count("|") != 5 or not line.split("|")[2].strip()] == []


def test_places_of_decided_rows_exist():
    """Folders and files named under `where`, of `src/triptych` or of the repository."""
    missing = []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| [A-M]-\d+ ", line):
            named = re.findall(r"`([^`]+)`", line.split("|")[4])
            missing += [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()]
    assert not missing, listing(sorted(set(missing)))


def test_a_row_that_is_not_listed_is_a_collection_error(tmp_path):
    result = collect(tmp_path, "import pytest\n\n\n@pytest.mark.requirement('B-44')\ndef test_it():\n    pass\n")
    assert result.returncode != 0
    assert "test_sample.py::test_it names requirement `B-44`, which is no row; did you mean B-4" in result.stdout


def test_entries_name_row_test_file_and_line(tmp_path):
    source = (
        "import pytest\n\n\n"
        "@pytest.mark.requirement('A-1', 'B-2')\n@pytest.mark.parametrize('x', [1, 2])\n@pytest.mark.slow\n"
        "def test_it(x):\n    pass\n\n\n"
        "@pytest.mark.requirement('A-2')\n@pytest.mark.skip(reason='shows nothing')\ndef test_skipped():\n    pass\n"
    )
    target = tmp_path / "rows.json"
    result = collect(tmp_path, source, f"--requirements-json={target}", "-m", "not slow")
    assert result.returncode in (0, 5), result.stdout  # 5: nothing left to run, for the marked test is a slow one
    entries = json.loads(target.read_text(encoding="utf-8"))
    test = {"test": "test_sample.py::test_it", "file": "test_sample.py", "line": 4}
    assert entries == [{"row": "A-1", **test}, {"row": "B-2", **test}]


def test_summary_has_a_line_a_group_and_a_total():
    rows = dict.fromkeys(["A-1", "A-2", "B-1", "B-2", "B-3"], "")
    assert summary(rows, {"A-1", "A-2", "B-2"}) == ["A 2/2", "B 1/3 missing: B-1 B-3", "covered 3/5"]


@pytest.mark.parametrize(("arguments", "expected"), [([], "covered 1/360"), (["--json"], '"row": "C-13"')])
def test_report_prints_what_was_collected(monkeypatch, capsys, arguments, expected):
    entry = {"row": "C-13", "test": "tests/x.py::test_y", "file": "tests/x.py", "line": 3}
    monkeypatch.setattr("tests.requirements_report.collect", lambda: ([entry], ""))
    assert main(arguments) == 0
    assert expected in capsys.readouterr().out


def test_report_fails_loudly_when_the_collection_did(monkeypatch, capsys):
    monkeypatch.setattr("tests.requirements_report.collect", lambda: ([], "ERROR tests/x.py"))
    assert main([]) == 1
    assert "ERROR tests/x.py" in capsys.readouterr().err
