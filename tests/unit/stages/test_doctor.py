"""The report names versions and finds nothing wrong with the tested environment."""

import io

import torch
from rich.console import Console

from triptych.stages.doctor import find_problems, report


def test_report_names_versions_and_devices() -> None:
    output = io.StringIO()
    assert report(Console(file=output, width=160))
    text = output.getvalue()
    assert torch.__version__ in text
    assert "no problem found" in text


def test_a_missing_package_is_a_problem_with_a_remedy(monkeypatch) -> None:
    monkeypatch.setattr("triptych.stages.doctor.PACKAGES", ("torch", "no-such-package"))
    (problem,) = find_problems()
    assert "no-such-package" in problem and "pip install" in problem
