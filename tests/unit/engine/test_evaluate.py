"""An evaluation leaves no trace, and no result hides another."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.unit.engine.toy_run import ToyEvaluator, ToyScorer
from triptych.core.errors import TrainingError
from triptych.engine.evaluate import run_evaluators


class Other:
    """Numbers of numpy and torch, and a look at whether gradients are on."""

    def run(self) -> dict[str, object]:
        return {"numpy": np.float32(0.5), "torch": torch.tensor(2), "grad": torch.is_grad_enabled()}


def test_results_are_joined_as_plain_numbers_without_gradients() -> None:
    scorer = ToyScorer().train()
    scorer.frozen.eval()
    torch.manual_seed(1)
    random.seed(1)
    expected = float(torch.rand(())), random.random()
    torch.manual_seed(1)
    random.seed(1)
    results = run_evaluators([ToyEvaluator(scorer, [1.5]), Other()], scorer)  # type: ignore[list-item]

    assert results == {"loss": 1.5, "numpy": 0.5, "torch": 2.0, "grad": 0.0}
    assert [type(value) for value in results.values()] == [float] * 4
    assert (scorer.training, scorer.dropout.training, scorer.frozen.training) == (True, True, False)
    assert (float(torch.rand(())), random.random()) == expected


def test_two_evaluators_with_one_name_are_refused() -> None:
    scorer = ToyScorer()
    with pytest.raises(TrainingError, match="two evaluators use one name: loss, loss"):
        run_evaluators([ToyEvaluator(scorer), ToyEvaluator(scorer)], scorer)
