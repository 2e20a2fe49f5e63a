"""Denominators, padding and the zero that reaches every parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.invariants.toys import OBJECTIVES, runtime, toy_batch, toy_window
from triptych.core.errors import TrainingError
from triptych.core.types import Origin, Progress, Scores
from triptych.engine.window import anchor, pad_batches, plan_window


@pytest.mark.requirement("C-13")
def test_denominators_are_sums_over_all_micro_batches() -> None:
    window = replace(toy_window((1, 3)), skipped=(Origin("toy.jsonl", 9),))
    plan = plan_window(OBJECTIVES["language"], window, runtime(), Progress(0, 1))
    assert plan.weights["language"] == pytest.approx(sum(float(batch.weights.sum()) for batch in window.batches))
    assert plan.factor("language") == 1.0 / plan.weights["language"]
    assert (plan.samples, plan.skipped_rows) == (4, 1)
    assert plan.tokens == sum(int(batch.lengths.sum()) for batch in window.batches)
    assert plan.supervised_tokens == sum(int(batch.supervised.sum()) for batch in window.batches)


@pytest.mark.requirement("C-13")
def test_the_loss_is_a_sum_over_the_global_weight() -> None:
    # 2 tokens at loss 4 and 98 at loss 1: 106 / 100, where a mean of means would be 2.5.
    plan = plan_window(OBJECTIVES["language"], toy_window((1,)), runtime(), Progress(0, 1))
    plan = replace(plan, weights={"language": 100.0})
    shares = [plan.loss({"language": torch.tensor(total)}) for total in (8.0, 98.0)]
    assert sum(float(share) for share in shares if share is not None) == pytest.approx(1.06)


def test_terms_without_weight_have_no_loss() -> None:
    plan = plan_window(OBJECTIVES["dpo"], toy_window((1,)), runtime(), Progress(0, 1))
    plan = replace(plan, weights={"dpo": 2.0, "sft": 0.0})
    assert plan.loss({"sft": torch.tensor(float("nan"))}) is None
    assert float(plan.loss({"sft": torch.tensor(float("nan")), "dpo": torch.tensor(3.0)})) == 1.5  # type: ignore[arg-type]


def test_short_ranks_repeat_their_cheapest_batch() -> None:
    long, short = toy_batch((0, 1, 2)), toy_batch((3,))
    assert pad_batches((long, short), 2) == (long, short)
    padded = pad_batches((long, short), 4)
    assert [batch.is_padding for batch in padded] == [False, False, True, True]
    assert padded[2].input_ids is short.input_ids and padded[2].num_examples == 0


def test_the_anchor_is_zero_even_beside_infinity() -> None:
    logprobs = torch.tensor([float("-inf"), 1.0], requires_grad=True)
    scale = torch.tensor(float("nan"), requires_grad=True)
    value = anchor(Scores(token_logprobs=logprobs, logit_scale=scale, rewards=torch.ones(2)))
    value.backward()
    assert float(value.detach()) == 0.0
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, 0.0]
    assert scale.grad is not None and float(scale.grad) == 0.0
    assert not anchor(Scores(rewards=torch.ones(2))).requires_grad


def test_the_models_own_term_name_is_reserved() -> None:
    class Clash:
        def __init__(self) -> None:
            self.coefficients = {"auxiliary": 1.0}

        def weights(self, batch: object, progress: object) -> dict[str, torch.Tensor]:
            return {"auxiliary": torch.tensor(1.0)}

    with pytest.raises(TrainingError, match="rename the term"):
        plan_window(Clash(), toy_window((1,)), runtime(), Progress(0, 1))  # type: ignore[arg-type]
