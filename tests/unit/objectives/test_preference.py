import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from tests.unit.objectives.batches import make_batch
from triptych.core.errors import TrainingError
from triptych.core.types import Progress, Scores
from triptych.objectives.preference import DpoConfig, DpoObjective, dpo_loss, row_logprobs

PROGRESS = Progress(step=0, total=10)


def value_of(objective, logprobs, batch):
    scores = Scores(token_logprobs=logprobs)
    terms, weights = objective.terms(scores, batch, None), objective.weights(batch, PROGRESS)
    assert terms.keys() == weights.keys() == objective.coefficients.keys()
    return sum(objective.coefficients[name] * terms[name] / weights[name] for name in terms)


def trl_loss(policy, reference, mask, *, loss_type, beta, label_smoothing=0.0):
    """TRL's own loss, run on given log-probabilities [2P, L] (winners first, then losers) in place of a model."""
    trainers = pytest.importorskip("trl.trainer.dpo_trainer")
    sums = (reference * mask[:, 1:]).sum(dim=1).chunk(2)
    zeros = torch.zeros_like(policy)
    outputs = SimpleNamespace(log_probs=policy * mask[:, 1:], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        args=SimpleNamespace(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums[0],
        "ref_rejected_logps": sums[1],
    }
    loss = trainers.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {name.removeprefix("rewards/"): values[-1] for name, values in trainer._metrics["train"].items()}


def two_pairs():
    """Winners are rows 0 and 2; prompts of one or two tokens, answers of unlike length."""
    rows = [[None, 1, 1, 1], [None, 1, 1], [None, None, 1, 1, 1, 1], [None, None, 1]]
    torch.manual_seed(3)
    count = sum(weight is not None for row in rows for weight in row)
    policy = -torch.rand(count, dtype=torch.float64) * 4
    reference = -torch.rand(count, dtype=torch.float64) * 4
    batch = make_batch(rows, pairs=[(0, 1), (2, 3)], token_values={"reference_logprobs": reference})
    return batch, policy.requires_grad_(), reference


@pytest.mark.requirement("H-27", "H-29", "H-30")
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_equals_trl_with_gradients_and_metrics(loss_type):
    batch, policy, reference = two_pairs()
    order = torch.tensor([0, 2, 1, 3])

    def dense(values):
        return torch.zeros(4, 6, dtype=torch.float64).index_put(batch.supervised.nonzero(as_tuple=True), values)[order]

    mask = batch.supervised.long()[order]
    objective = DpoObjective(DpoConfig(beta=0.3, length_normalised=loss_type == "sigmoid_norm"))
    ours = value_of(objective, policy, batch)
    theirs, logged = trl_loss(dense(policy)[:, 1:], dense(reference)[:, 1:], mask, loss_type=loss_type, beta=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    mine, other = torch.autograd.grad(ours, policy)[0], torch.autograd.grad(theirs, policy)[0]
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    if loss_type == "sigmoid":
        metrics = {
            name: (part / weight).item()
            for name, (part, weight) in objective.metrics(Scores(token_logprobs=policy), batch).items()
        }
        assert metrics == pytest.approx(
            {
                "reward_margin": logged["margins"],
                "accuracy": logged["accuracies"],
                "chosen_reward": logged["chosen"],
                "rejected_reward": logged["rejected"],
                "chosen_logprob": logged["logps/chosen"],
            }
        )


@pytest.mark.requirement("H-29")
def test_label_smoothing_equals_trl_on_one_pair():
    # TRL smooths its order-statistics losses this way; with a single pair there is nothing to sort.
    policy = torch.tensor([[-1.0, -2.0], [-0.5, -1.0]])
    reference = torch.tensor([[-1.5, -1.0], [-2.5, -1.0]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 1]])
    theirs, _ = trl_loss(policy, reference, mask, loss_type="aot", beta=0.5, label_smoothing=0.2)
    batch = make_batch(
        [[None, 1, 1], [None, 1, 1]], pairs=[(0, 1)], token_values={"reference_logprobs": reference.flatten()}
    )
    ours = value_of(DpoObjective(DpoConfig(beta=0.5, label_smoothing=0.2)), policy.flatten(), batch)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.requirement("H-29")
def test_loss_by_hand():
    # Winner's log-ratio -3 - (-4) = 1, loser's -2 - (-1) = -1; beta 0.1: margin 0.2.
    batch = make_batch(
        [[None, 1, 1], [None, 1]], pairs=[(0, 1)], token_values={"reference_logprobs": torch.tensor([-2.0, -2.0, -1.0])}
    )
    logprobs = torch.tensor([-1.0, -2.0, -2.0])
    objective = DpoObjective(DpoConfig())
    assert value_of(objective, logprobs, batch).item() == pytest.approx(math.log(1 + math.exp(-0.2)))
    metrics = {
        name: part.item() for name, (part, _) in objective.metrics(Scores(token_logprobs=logprobs), batch).items()
    }
    assert metrics == pytest.approx(
        {"reward_margin": 0.2, "accuracy": 1.0, "chosen_reward": 0.1, "rejected_reward": -0.1, "chosen_logprob": -3.0}
    )
    assert dpo_loss(torch.tensor([0.2]), 0.25).item() == pytest.approx(
        0.75 * math.log(1 + math.exp(-0.2)) + 0.25 * math.log(1 + math.exp(0.2))
    )


@pytest.mark.requirement("H-27")
def test_defaults():
    config = DpoConfig()
    assert (config.kind, config.beta, config.label_smoothing, config.length_normalised) == ("dpo", 0.1, 0.0, False)


@pytest.mark.requirement("H-28")
def test_prompt_padding_and_weightless_tokens_do_not_count():
    batch = make_batch([[None, 1, 0.5], [None, None, 0, 1, None]])
    sums, counts = row_logprobs(torch.tensor([-1.0, -2.0, -50.0, -4.0]), batch)
    assert (sums.tolist(), counts.tolist()) == ([-3.0, -4.0], [2.0, 1.0])


def test_micro_batches_sum_to_the_whole_with_gradients():
    objective = DpoObjective(DpoConfig(sft_coefficient=0.5))
    batch, policy, reference = two_pairs()
    whole = value_of(objective, policy, batch)
    expected = torch.autograd.grad(whole, policy)[0]
    split = [
        make_batch([[None, 1, 1, 1], [None, 1, 1]], pairs=[(0, 1)], token_values={"reference_logprobs": reference[:5]}),
        make_batch(
            [[None, None, 1, 1, 1, 1], [None, None, 1]],
            pairs=[(0, 1)],
            token_values={"reference_logprobs": reference[5:]},
        ),
    ]
    weights = [objective.weights(part, PROGRESS) for part in split]
    total = 0
    for part, logprobs in zip(split, (policy[:5], policy[5:]), strict=True):
        terms = objective.terms(Scores(token_logprobs=logprobs), part, None)
        total = total + sum(
            objective.coefficients[name] * term / sum(item[name] for item in weights) for name, term in terms.items()
        )
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(total, policy)[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.requirement("H-29")
def test_sft_term_counts_each_preferred_answer_once():
    # A ranking of three: row 0 wins twice, row 1 once; row 2 never.
    objective = DpoObjective(DpoConfig(sft_coefficient=2.0))
    batch = make_batch(
        [[None, 1], [None, 0.5], [None, 1]],
        pairs=[(0, 1), (0, 2), (1, 2)],
        token_values={"reference_logprobs": torch.zeros(3)},
    )
    terms = objective.terms(Scores(token_logprobs=torch.tensor([-1.0, -4.0, -9.0])), batch, None)
    assert terms["sft"].item() == pytest.approx(1.0 + 0.5 * 4.0)
    assert objective.weights(batch, PROGRESS)["sft"].item() == 1.5
    assert objective.coefficients == {"dpo": 1.0, "sft": 2.0}


def test_pair_weights_scale_pairs_and_the_denominator():
    batch = make_batch(
        [[None, 1], [None, 1]],
        pairs=[(0, 1), (1, 0)],
        pair_weights=[3.0, 1.0],
        token_values={"reference_logprobs": torch.zeros(2)},
    )
    loss = value_of(DpoObjective(DpoConfig(beta=1.0)), torch.tensor([-1.0, -3.0]), batch)
    expected = (3 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 4
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_padding_batch_and_batch_without_pairs_count_nothing():
    objective = DpoObjective(DpoConfig(sft_coefficient=1.0))
    values = {"reference_logprobs": torch.zeros(2)}
    rows = [[None, 1], [None, 1]]
    for batch in (
        make_batch(rows, pairs=[(0, 1)], token_values=values, is_padding=True),
        make_batch(rows, token_values=values),
    ):
        logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
        terms = objective.terms(Scores(token_logprobs=logprobs), batch, None)
        sum(terms.values()).backward()
        assert [term.item() for term in terms.values()] == [0.0, 0.0]
        assert [weight.item() for weight in objective.weights(batch, PROGRESS).values()] == [0.0, 0.0]
        assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.requirement("H-27")
def test_missing_reference_is_an_error_with_a_remedy():
    batch = make_batch([[None, 1], [None, 1]], pairs=[(0, 1)])
    with pytest.raises(TrainingError, match="no reference log-probabilities") as error:
        DpoObjective(DpoConfig()).terms(Scores(token_logprobs=torch.zeros(2)), batch, None)
    assert "reference model" in (error.value.problems[0].remedy or "")


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"sft_coefficient": -1.0}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValidationError):
        DpoConfig(**values)
