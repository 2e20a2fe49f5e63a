"""Gradients do not depend on how a window is split into micro-batches."""

from __future__ import annotations

from copy import deepcopy

import pytest

from tests.invariants.real import real_case
from tests.invariants.toys import (
    OBJECTIVES,
    SPLITS,
    ToyReference,
    ToyScorer,
    ToySource,
    direct_gradients,
    gradients,
    relative_distance,
    runtime,
    toy_window,
)
from triptych.core.types import Progress
from triptych.engine.step import run_window


@pytest.mark.requirement("C-13", "F-26", "F-28")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_whole_window_as_one_batch(name: str, split: str) -> None:
    scorer = ToyScorer()
    loss, expected = direct_gradients(scorer, name)
    result = run_window(
        scorer, OBJECTIVES[name], toy_window(SPLITS[split]), ToySource(), ToyReference(), runtime(), Progress(0, 1)
    )
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert relative_distance(expected, gradients(scorer)) < 1e-12
    assert result.samples == 8 and not result.non_finite


@pytest.mark.requirement("C-13")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_reported_numbers_do_not_depend_on_the_split(name: str) -> None:
    results = []
    for split in SPLITS.values():
        window = toy_window(split)
        arguments = (OBJECTIVES[name], window, ToySource(), ToyReference(), runtime(), Progress(0, 1))
        results.append(run_window(ToyScorer(), *arguments))
    for result in results[1:]:
        assert result.terms == pytest.approx(results[0].terms, rel=1e-12)
        assert result.metrics == pytest.approx(results[0].metrics, rel=1e-6)
        assert result.weights == pytest.approx(results[0].weights)
        counts = [(item.samples, item.tokens, item.supervised_tokens) for item in (result, results[0])]
        assert counts[0] == counts[1]


@pytest.mark.requirement("C-13", "F-28")
def test_a_mean_of_micro_batch_means_would_be_wrong() -> None:
    # The check must be able to fail: 8 windows of one example, averaged, are not the window of 8.
    scorer = ToyScorer()
    _, expected = direct_gradients(scorer, "language")
    total = {name: 0.0 * gradient for name, gradient in expected.items()}
    for example in range(8):
        alone = deepcopy(scorer)
        window = toy_window((1,), first=example)
        run_window(alone, OBJECTIVES["language"], window, ToySource(), None, runtime(), Progress(0, 1))
        for name, gradient in gradients(alone).items():
            total[name] += gradient / 8
    assert relative_distance(expected, total) > 0.01


@pytest.mark.requirement("C-13")
@pytest.mark.parametrize("name", ["llava/language", "llava/dpo", "siglip/siglip", "clip/clip"])
def test_real_architectures_in_single_precision(name: str) -> None:
    found = {}
    splits = {"1x8": [range(8)], "8x1": [(n,) for n in range(8)], "ragged": [(0, 1, 2), (3,), range(4, 8)]}
    for key, split in splits.items():
        case = real_case(name)
        window, source = case.window(split)
        result = run_window(case.scorer, case.objective, window, source, case.reference, runtime(), Progress(0, 1))
        grads = {name: item.grad for name, item in case.scorer.named_parameters() if item.grad is not None}
        found[key] = (result.loss, grads)
    for key in ("8x1", "ragged"):
        assert found[key][0] == pytest.approx(found["1x8"][0], rel=1e-6)
        assert relative_distance(found["1x8"][1], found[key][1]) < 1e-5
