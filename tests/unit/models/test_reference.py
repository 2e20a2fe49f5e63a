"""Reference log-probabilities: those of the model before training, whatever happens to the policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny import tiny_family, token_id
from triptych.core.errors import ModelError
from triptych.core.types import IGNORE, Batch, Origin, Scores
from triptych.models.components import find_components
from triptych.models.reference import REFERENCE_LOGPROBS, AdapterOffReference, FrozenReference
from triptych.models.tuning import TuningPlan, apply_tuning
from triptych.models.tuning_rules import FrozenRule, FullRule, LoraRule

IMAGE = token_id("<image>")


class PlainScorer(nn.Module):
    """Log-probabilities by the definition, from full logits."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.noise = nn.Dropout(0.5)
        self.head = nn.Linear(1, 1)
        """Stands for a value head: trained, but not part of the log-probabilities."""

    def forward(self, batch: Batch) -> Scores:
        assert batch.pixels is not None
        logits = self.hf(input_ids=batch.input_ids, use_cache=False, **batch.pixels).logits
        logprobs = self.noise(logits).float().log_softmax(-1)
        rows, columns = batch.supervised.nonzero(as_tuple=True)
        return Scores(
            token_logprobs=logprobs[rows, columns - 1, batch.labels[rows, columns]],
            values=self.head(torch.ones(1, 1)).flatten(),
        )


def batch() -> Batch:
    """Two answers to a picture; three and two supervised tokens."""
    prompt = [5, *[IMAGE] * 16, 6]
    ids = torch.tensor([[*prompt, 10, 11, 12], [*prompt, 13, 14, 0]])
    labels = torch.full_like(ids, IGNORE)
    labels[0, -3:] = ids[0, -3:]
    labels[1, -3:-1] = ids[1, -3:-1]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    return Batch(
        input_ids=ids,
        labels=labels,
        weights=(labels != IGNORE).float(),
        kinds=torch.zeros_like(ids, dtype=torch.uint8),
        lengths=torch.tensor([21, 20]),
        example_index=torch.tensor([0, 0]),
        tree_index=torch.tensor([0, 0]),
        trunk_lengths=torch.tensor([18, 18]),
        images=(),
        row_images=((), ()),
        origins=(Origin("pairs.json", 1), Origin("pairs.json", 1)),
        tasks=("", ""),
        pairs=torch.tensor([[0, 1]]),
        pair_weights=torch.ones(1),
        text_keys=torch.tensor([1, 2]),
        token_values={"old": torch.zeros(5)},
        pixels={"pixel_values": pixels},
    )


def policy(*first: Any, tokens: tuple[int, ...] = (10,)) -> tuple[PlainScorer, TuningPlan]:
    hf = tiny_family("llava")[0]
    rules = [*first, LoraRule(match="language", method="lora", rank=4, dropout=0.2, train_tokens=tokens)]
    plan = apply_tuning(hf, find_components(hf), [*rules, FrozenRule(match="*", method="frozen")], 1e-3)
    return PlainScorer(hf), plan


def reference(kind: str, scorer: PlainScorer, plan: TuningPlan) -> FrozenReference | AdapterOffReference:
    return FrozenReference(scorer) if kind == "frozen" else AdapterOffReference(scorer, plan)


def score(scorer: PlainScorer) -> Tensor:
    logprobs = scorer(batch()).token_logprobs
    assert logprobs is not None
    return logprobs


def train(scorer: PlainScorer, plan: TuningPlan, steps: int = 2) -> None:
    parameters = [parameter for group in plan.groups for parameter in group.parameters.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        score(scorer).sum().backward()
        optimizer.step()


KINDS = pytest.mark.parametrize("kind", ["frozen", "adapter_off"])


@KINDS
@pytest.mark.requirement("H-27")
def test_at_step_zero_the_reference_is_the_policy_and_training_does_not_move_it(kind: str) -> None:
    scorer, plan = policy()
    start = score(scorer.eval()).detach()
    fixed = reference(kind, scorer, plan)
    attached = fixed.attach(batch())
    values = attached.token_values[REFERENCE_LOGPROBS]
    assert values.shape == (5,) and values.dtype == torch.float32 and not values.requires_grad
    assert torch.equal(values, start)
    assert set(attached.token_values) == {"old", REFERENCE_LOGPROBS}
    train(scorer.train(), plan)
    assert not torch.allclose(score(scorer.eval()), start, atol=1e-2)
    assert torch.equal(fixed.attach(batch()).token_values[REFERENCE_LOGPROBS], start)


@KINDS
@pytest.mark.requirement("H-27")
def test_the_reference_has_no_dropout_and_leaves_modes_gradients_and_randomness_alone(kind: str) -> None:
    scorer, plan = policy()
    start = score(scorer.eval()).detach()
    scorer.train()
    scorer.hf.model.vision_tower.eval()
    fixed = reference(kind, scorer, plan)
    modes = {name: module.training for name, module in scorer.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in scorer.named_parameters()}
    random = torch.get_rng_state()
    assert torch.equal(fixed.attach(batch()).token_values[REFERENCE_LOGPROBS], start)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in scorer.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in scorer.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in scorer.parameters())
    assert score(scorer).requires_grad


def test_both_kinds_agree_after_training_too() -> None:
    scorer, plan = policy()
    frozen, off = FrozenReference(scorer), AdapterOffReference(scorer, plan)
    train(scorer, plan)
    assert torch.equal(
        frozen.attach(batch()).token_values[REFERENCE_LOGPROBS], off.attach(batch()).token_values[REFERENCE_LOGPROBS]
    )


def test_a_frozen_copy_has_no_trainable_parameter_and_serves_full_tuning() -> None:
    scorer, plan = policy(FullRule(match="connector", method="full"))
    fixed = FrozenReference(scorer)
    start = score(scorer.eval()).detach()
    train(scorer, plan)
    assert torch.equal(fixed.attach(batch()).token_values[REFERENCE_LOGPROBS], start)


def test_a_reference_inside_autocast_does_not_stop_the_policy_from_training() -> None:
    scorer, plan = policy()
    off = AdapterOffReference(scorer, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attached = off.attach(batch())
        scores = scorer.eval()(attached)
        assert torch.equal(attached.token_values[REFERENCE_LOGPROBS], scores.token_logprobs)
        (scores.token_logprobs.sum() + scores.values.sum()).backward()
    # A cast of the head's weight kept from the reference pass would carry no gradient.
    assert scorer.head.weight.grad is not None


@pytest.mark.requirement("H-27")
def test_an_adapter_off_reference_is_refused_where_it_would_not_be_the_start() -> None:
    scorer, plan = policy(FullRule(match="connector", method="full"))
    with pytest.raises(ModelError, match="`connector` train base weights"):
        AdapterOffReference(scorer, plan)
    scorer, plan = policy()
    train(scorer, plan, steps=1)
    with pytest.raises(ModelError, match="already trained"):
        AdapterOffReference(scorer, plan)
    hf = tiny_family("llava")[0]
    plan = apply_tuning(hf, find_components(hf), [FrozenRule(match="*", method="frozen")], 1e-3)
    with pytest.raises(ModelError, match="needs adapters") as caught:
        AdapterOffReference(PlainScorer(hf), plan)
    (problem,) = caught.value.problems
    assert problem.key == "reference" and problem.remedy == "set `reference: frozen`, or let `tuning` add LoRA"


def test_trained_token_rows_count_as_a_trained_adapter() -> None:
    scorer, plan = policy()
    row = next(value for name, value in scorer.named_parameters() if "trainable_tokens_delta" in name)
    with torch.no_grad():
        row.add_(1.0)
    with pytest.raises(ModelError, match="already trained"):
        AdapterOffReference(scorer, plan)


def test_a_scorer_without_logprobs_is_named() -> None:
    class Silent(nn.Module):
        def forward(self, batch: Batch) -> Scores:
            return Scores()

    with pytest.raises(ModelError, match="no token log-probabilities"):
        FrozenReference(Silent()).attach(batch())
