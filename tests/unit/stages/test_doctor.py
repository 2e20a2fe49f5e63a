"""The environment report."""

from __future__ import annotations

import importlib.metadata

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
