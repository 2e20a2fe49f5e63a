"""Measuring a window gives the numbers of training on it, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from tests.invariants.toys import OBJECTIVES, ToyReference, ToyScorer, ToySource, runtime, toy_window
from triptych.core.types import Progress
from triptych.engine.measure import measure_window
from triptych.engine.step import run_window


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_measured_numbers_are_those_of_the_training_step(name: str) -> None:
    objective, window = OBJECTIVES[name], toy_window((3, 1, 4))
    trained, measured = ToyScorer(), ToyScorer()
    measured.load_state_dict(trained.state_dict())
    step = run_window(trained, objective, window, ToySource(), ToyReference(), runtime(), Progress(0, 1))
    result = measure_window(measured, objective, window, ToySource(), ToyReference(), runtime())
    assert result.loss == pytest.approx(step.loss, rel=1e-12)
    assert result.terms == pytest.approx(step.terms, rel=1e-12)
    assert result.metrics == pytest.approx(step.metrics, rel=1e-12)
    assert (result.samples, result.weights) == (step.samples, step.weights)
    assert all(parameter.grad is None for parameter in measured.parameters())
    assert any(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_split_of_the_window_changes_nothing(name: str) -> None:
    scorer = ToyScorer()
    whole, split = (
        measure_window(scorer, OBJECTIVES[name], toy_window(sizes), ToySource(), ToyReference(), runtime())
        for sizes in ((8,), (1, 5, 2))
    )
    assert split.loss == pytest.approx(whole.loss, rel=1e-12)
    assert split.metrics == pytest.approx(whole.metrics, rel=1e-12)


def test_gradients_stay_off_outside_too() -> None:
    scorer = ToyScorer()
    with torch.no_grad():
        measure_window(scorer, OBJECTIVES["language"], toy_window((2,)), ToySource(), ToyReference(), runtime())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
