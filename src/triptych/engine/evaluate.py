"""Evaluation during training, without a trace in the training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from triptych.core.errors import TrainingError
from triptych.core.protocols import Evaluator
from triptych.engine.state import untouched_modes, untouched_random_state


def run_evaluators(evaluators: Sequence[Evaluator], scorer: nn.Module) -> dict[str, float]:
    """Results of all evaluators together; random numbers and train or eval modes are afterwards as before.

    Raises:
        TrainingError: two evaluators use the same name.
    """
    with untouched_random_state(), untouched_modes(scorer), torch.no_grad():
        found = [item for evaluator in evaluators for item in evaluator.run().items()]
    results = {name: float(value) for name, value in found}
    if len(results) < len(found):
        names = ", ".join(sorted(name for name, _ in found))
        raise TrainingError(f"two evaluators use one name: {names}", remedy="name each metric once")
    return results
