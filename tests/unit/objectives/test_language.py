import math

import pytest
import torch
import torch.nn.functional as F

from tests.unit.objectives.batches import make_batch
from triptych.core.types import Progress, Scores
from triptych.objectives.language import LanguageConfig, LanguageObjective, language_loss

PROGRESS = Progress(step=0, total=10)
OBJECTIVE = LanguageObjective(LanguageConfig())


def loss_of(parts):
    """The number the engine minimises: summed terms over summed weights."""
    terms = sum(OBJECTIVE.terms(Scores(token_logprobs=logprobs), batch, None)["language"] for logprobs, batch in parts)
    weights = sum(OBJECTIVE.weights(batch, PROGRESS)["language"] for _, batch in parts)
    return terms / weights


@pytest.mark.requirement("C-1")
def test_loss_is_a_sum_of_weighted_negative_logprobs():
    logprobs = torch.log(torch.tensor([0.5, 0.25]))
    loss = language_loss(logprobs, torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx(math.log(2) + 2 * math.log(4))


@pytest.mark.requirement("C-2", "C-14")
def test_weights_of_zero_and_one_are_the_cross_entropy_over_unmasked_tokens():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11, dtype=torch.float64, requires_grad=True)
    batch = make_batch([[None, None, 1, 1, 1, 1], [None, 1, 0, None, 1], [None, None, 1]])
    labels = torch.where(batch.supervised, torch.randint(0, 11, (3, 6)), -100)
    shifted = F.log_softmax(logits[:, :-1], dim=-1)
    rows, columns = batch.supervised.nonzero(as_tuple=True)
    logprobs = shifted[rows, columns - 1, labels[rows, columns]]

    loss = loss_of([(logprobs, batch)])
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]

    masked = labels.masked_fill(batch.weights == 0, -100)
    reference = F.cross_entropy(logits[:, :-1].reshape(-1, 11), masked[:, 1:].reshape(-1), ignore_index=-100)
    theirs = torch.autograd.grad(reference, logits)[0]
    assert loss.item() == pytest.approx(reference.item(), abs=1e-14)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.requirement("C-14")
def test_fractional_weights_average_by_weight():
    logprobs = torch.tensor([-1.0, -4.0])
    batch = make_batch([[None, 1.0, 0.5]])
    assert loss_of([(logprobs, batch)]).item() == pytest.approx((1.0 * 1 + 0.5 * 4) / 1.5)


@pytest.mark.requirement("C-13")
def test_micro_batches_of_unlike_length_weigh_by_tokens():
    # 2 tokens at loss 4 and 98 at loss 1: 1.06, where the mean of means says 2.5.
    short = (torch.full((2,), -4.0), make_batch([[None, 1, 1]]))
    long = (torch.full((98,), -1.0), make_batch([[None] + [1] * 98]))
    assert loss_of([short, long]).item() == pytest.approx(1.06)


@pytest.mark.requirement("C-2")
def test_batch_without_supervised_tokens_gives_zero_and_a_gradient_of_zero():
    batch = make_batch([[None, None, None]])
    logprobs = torch.zeros(0, requires_grad=True)
    term = OBJECTIVE.terms(Scores(token_logprobs=logprobs), batch, None)["language"]
    term.backward()
    assert term.item() == 0.0
    assert OBJECTIVE.weights(batch, PROGRESS)["language"].item() == 0.0
    assert logprobs.grad is not None


def test_padding_batch_counts_nothing():
    batch = make_batch([[None, 1, 1]], tasks=["vqa"], is_padding=True)
    logprobs = torch.tensor([-3.0, -5.0], requires_grad=True)
    scores = Scores(token_logprobs=logprobs)
    term = OBJECTIVE.terms(scores, batch, None)["language"]
    term.backward()
    assert (term.item(), OBJECTIVE.weights(batch, PROGRESS)["language"].item()) == (0.0, 0.0)
    assert logprobs.grad.tolist() == [0.0, 0.0]
    assert all((part.item(), weight.item()) == (0.0, 0.0) for part, weight in OBJECTIVE.metrics(scores, batch).values())


def test_metrics_give_nats_by_task():
    batch = make_batch([[None, 1, 2], [None, 1], [None, 0, 1]], tasks=["vqa", "ocr", ""])
    logprobs = torch.tensor([-1.0, -3.0, -5.0, -100.0, -7.0])
    metrics = OBJECTIVE.metrics(Scores(token_logprobs=logprobs), batch)
    assert {name: (part.item(), weight.item()) for name, (part, weight) in metrics.items()} == {
        "language/vqa": (4.0, 2.0),
        "language/ocr": (5.0, 1.0),
        "supervised_tokens_per_row": (4.0, 3.0),
    }
