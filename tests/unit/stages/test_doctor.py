"""The environment report."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import triptych
from triptych.stages import doctor


def test_this_environment_is_reported_as_good() -> None:
    done = triptych("doctor")
    assert done.status == 0, done.out
    assert "torch" in done.out and importlib.metadata.version("torch") in done.out
    assert "no problem found" in done.out


def test_problems_carry_a_remedy_and_set_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"pillow": "13.0.0", "webdataset": None}
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, found(name)))
    problems = doctor.find_problems()
    assert problems == [
        "webdataset is not installed -> pip install -c constraints.txt -e .",
        "pillow 13.0.0 conflicts with gradio and trackio -> pip install 'pillow<13'",
    ]
    done = triptych("doctor")
    assert done.status == 1 and "problem: pillow 13.0.0" in done.out


def test_broken_libraries_are_reported_and_the_rest_of_the_report_stands(tmp_path: Path) -> None:
    for name in ("peft", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator nms does not exist\\nsee above')")
    command = [sys.executable, "-m", "triptych.cli", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stderr == ""
    assert "peft does not import (RuntimeError: operator nms does not exist) -> pip install" in done.stdout
    assert "torchvision is installed but does not import" in done.stdout and "pip uninstall torchvision" in done.stdout
    assert "CPU (" in done.stdout and "GiB free of" in done.stdout
