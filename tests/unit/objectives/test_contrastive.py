import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.unit.objectives.batches import join, make_pairs_batch
from triptych.core.errors import TrainingError
from triptych.core.types import Progress, Scores
from triptych.objectives.contrastive import (
    ContrastiveConfig,
    ContrastiveObjective,
    info_nce,
    positive_pairs,
    siglip_loss,
)

PROGRESS = Progress(step=0, total=10)


def open_clip_losses():
    """open_clip's loss module alone: the package needs torchvision, this file does not."""
    for folder in map(Path, sys.path):
        path = folder / "open_clip" / "loss.py"
        if path.is_file():
            spec = importlib.util.spec_from_file_location("open_clip_loss_alone", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    pytest.skip("open_clip_torch is not installed")


def make_leaves(rows, width=5, seed=0, scale=7.0, bias=-2.0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    return images, texts, log_scale, torch.tensor(bias, dtype=torch.float64, requires_grad=True)


def window_loss(leaves, sizes, loss, keys=None, padding=()):
    """The two-pass step in small: observe, window gradients, then `observe` again carries them back.

    `sizes`: rows of each micro-batch; those in `padding` hold copies that must count nothing.
    """
    images, texts, log_scale, bias = leaves
    objective = ContrastiveObjective(ContrastiveConfig(loss=loss))
    keys = list(range(1, images.shape[0] + 1)) if keys is None else keys
    batches, scores, start = [], [], 0
    for number, size in enumerate(sizes):
        is_padding = number in padding
        rows = slice(0, size) if is_padding else slice(start, start + size)
        batches.append(make_pairs_batch(keys[rows], is_padding))
        scores.append(
            Scores(
                image_embeddings=images[rows],
                text_embeddings=texts[rows],
                logit_scale=log_scale.exp(),
                logit_bias=bias if loss == "siglip" else None,
            )
        )
        start += 0 if is_padding else size
    assert start == images.shape[0]
    windows = join([objective.observe(*pair) for pair in zip(scores, batches, strict=True)])
    weights = sum(objective.weights(batch, PROGRESS)[next(iter(objective.coefficients))] for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch, window in zip(batches, windows, strict=True):
        terms = objective.window_terms(batch, window)
        assert terms.keys() == objective.coefficients.keys()
        total = total + sum(objective.coefficients[name] * terms[name] for name in terms) / weights
    total.backward()
    for number, (score, batch, window) in enumerate(zip(scores, batches, windows, strict=True)):
        for name, value in objective.observe(score, batch).items():
            if name in objective.differentiable:
                gradient = window.values[name].grad
                if value.ndim:
                    value.backward(gradient.narrow(0, window.starts[name], window.counts[name]), retain_graph=True)
                elif number == 0:
                    value.backward(gradient, retain_graph=True)
    used = [images, texts, log_scale] + ([bias] if loss == "siglip" else [])
    return total.detach(), [leaf.grad for leaf in used]


def reference(leaves, function, loss):
    images, texts, log_scale, bias = leaves
    inputs = [F.normalize(images, dim=-1), F.normalize(texts, dim=-1), log_scale.exp()]
    used = [images, texts, log_scale]
    if loss == "siglip":
        inputs, used = [*inputs, bias], [*used, bias]
    value = function(*inputs)
    return value.detach(), torch.autograd.grad(value, used)


def assert_equal(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


@pytest.mark.requirement("B-4", "B-5")
@pytest.mark.parametrize("sizes", [(8,), (3, 5), (1, 4, 1, 2)])
def test_clip_equals_open_clip_with_gradients_however_split(sizes):
    theirs = reference(make_leaves(8), open_clip_losses().ClipLoss(), "clip")
    assert_equal(window_loss(make_leaves(8), sizes, "clip"), theirs)


@pytest.mark.parametrize("sizes", [(8,), (3, 5), (1, 4, 1, 2)])
def test_siglip_equals_open_clip_with_gradients_however_split(sizes):
    theirs = reference(make_leaves(8), open_clip_losses().SigLipLoss(), "siglip")
    assert_equal(window_loss(make_leaves(8), sizes, "siglip"), theirs)


@pytest.mark.requirement("B-3", "B-5", "B-10")
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_uneven_shares_and_padding_sum_to_the_whole(loss):
    keys = [11, 12, 11, 13, 14, 12, 11, 15]
    whole = window_loss(make_leaves(8), (8,), loss, keys)
    assert_equal(window_loss(make_leaves(8), (5, 1, 2), loss, keys), whole)
    assert_equal(window_loss(make_leaves(8), (5, 2, 3), loss, keys, padding={1}), whole)


@pytest.mark.requirement("B-8", "B-9")
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_symmetric_loss_is_the_mean_of_both_directions_at_scale_one_over_temperature(temperature):
    leaves = make_leaves(6, scale=1 / temperature)
    images, texts, *_ = leaves
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T / temperature
    labels = torch.arange(6)
    one_direction = F.cross_entropy(logits, labels)
    both = (one_direction + F.cross_entropy(logits.T, labels)) / 2
    assert window_loss(leaves, (2, 4), "clip")[0].item() == pytest.approx(both.item(), abs=1e-13)
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    ours = info_nce(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), torch.eye(6, dtype=torch.bool), scale)
    assert ours.item() / 6 == pytest.approx(one_direction.item(), abs=1e-13)


def test_more_keys_than_queries_with_positives_anywhere():
    # Two queries, three keys; the positives are columns 2 and 0.
    queries, keys = torch.eye(3)[:2], torch.eye(3)[[1, 2, 0]]
    positives = torch.tensor([[False, False, True], [True, False, False]])
    loss = info_nce(queries, keys, positives, torch.tensor(2.0))
    assert loss.item() == pytest.approx(2 * math.log(1 + 2 * math.exp(-2)), abs=1e-6)


@pytest.mark.requirement("B-1", "B-11")
def test_equal_captions_are_positives_by_hand():
    # Rows 0 and 2 share a caption. With unit logits [[1,0,1],[0,1,0],[1,0,1]] and s = 1:
    # row 0: -1/2 (log p0 + log p2) = log(2e + 1) - 1;  row 1: log(e + 2) - 1.
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    positives = positive_pairs(torch.tensor([5, 6, 5]), torch.tensor([5, 6, 5]), start=0)
    assert positives.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    loss = info_nce(vectors, vectors, positives, torch.tensor(1.0))
    assert loss.item() == pytest.approx(2 * (math.log(2 * math.e + 1) - 1) + math.log(math.e + 2) - 1, abs=1e-6)

    # Sigmoid: 5 positives, 4 negatives; the positives have logit 1, the negatives 0.
    sigmoid = siglip_loss(vectors, vectors, positives, torch.tensor(1.0), torch.tensor(0.0))
    assert sigmoid.item() == pytest.approx(5 * math.log(1 + math.exp(-1)) + 4 * math.log(2), abs=1e-6)


@pytest.mark.requirement("B-1")
def test_rows_without_a_key_are_positive_only_of_themselves():
    positives = positive_pairs(torch.tensor([0, 9]), torch.tensor([9, 0, 0, 9]), start=2)
    assert positives.tolist() == [[False, False, True, False], [True, False, False, True]]


@pytest.mark.requirement("B-6")
def test_metrics_are_exact_over_uneven_shares():
    objective = ContrastiveObjective(ContrastiveConfig())
    # Pictures 0..3 point at texts 0, 1, 0, 3: three of four right; texts 0..3 find pictures 0, 1, 0 (tie: first), 3.
    axes = torch.eye(4)
    images = axes[[0, 1, 0, 3]] * 9
    texts = torch.stack([axes[0], axes[1], axes[0] * 0.6 + axes[2] * 0.8, axes[3]])
    shares = [slice(0, 1), slice(1, 4)]
    batches = [make_pairs_batch([1, 2, 3, 4][share]) for share in shares]
    observed = [
        objective.observe(
            Scores(image_embeddings=images[share], text_embeddings=texts[share], logit_scale=torch.tensor(20.0)), batch
        )
        for share, batch in zip(shares, batches, strict=True)
    ]
    sums = {"acc_i2t": [0.0, 0.0], "acc_t2i": [0.0, 0.0], "logit_scale": [0.0, 0.0]}
    for batch, window in zip(batches, join(observed), strict=True):
        for name, (part, weight) in objective.window_metrics(batch, window).items():
            sums[name][0] += part.item()
            sums[name][1] += weight.item()
    assert sums == {"acc_i2t": [3.0, 4.0], "acc_t2i": [3.0, 4.0], "logit_scale": [80.0, 4.0]}


@pytest.mark.requirement("B-4")
def test_logits_stay_in_full_precision_under_autocast():
    leaves = make_leaves(8, width=64)
    images, texts = (F.normalize(leaf.detach().float(), dim=-1) for leaf in leaves[:2])
    positives, scale = torch.eye(8, dtype=torch.bool), torch.tensor(100.0)
    plain = info_nce(images, texts, positives, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(images, texts, positives, scale).item() == plain.item()


def test_half_precision_embeddings_are_observed_in_fp32():
    objective = ContrastiveObjective(ContrastiveConfig())
    half = torch.randn(2, 3, dtype=torch.bfloat16)
    scores = Scores(image_embeddings=half, text_embeddings=half, logit_scale=torch.tensor(10.0, dtype=torch.bfloat16))
    observed = objective.observe(scores, make_pairs_batch([1, 2]))
    assert {observed[name].dtype for name in objective.differentiable} == {torch.float32}
    assert observed["image_embeddings"].norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])


def test_one_micro_batch_alone_gives_no_terms():
    objective = ContrastiveObjective(ContrastiveConfig())
    batch = make_pairs_batch([1, 2])
    assert objective.terms(Scores(), batch, None) == {} and objective.metrics(Scores(), batch) == {}
    assert objective.weights(batch, PROGRESS) == {"loss_i2t": torch.tensor(2.0), "loss_t2i": torch.tensor(2.0)}


def test_siglip_without_a_bias_is_refused_with_the_remedy():
    objective = ContrastiveObjective(ContrastiveConfig(loss="siglip"))
    scores = Scores(image_embeddings=torch.ones(1, 2), text_embeddings=torch.ones(1, 2), logit_scale=torch.tensor(1.0))
    with pytest.raises(TrainingError, match="no logit bias") as error:
        objective.observe(scores, make_pairs_batch([1]))
    assert "clip" in (error.value.problems[0].remedy or "")
