"""Lexical alignment: values by hand, and the same however a window is split."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.unit.objectives.batches import make_batch
from triptych.core.types import ImageReference, Progress, Scores
from triptych.objectives.bag_of_words import BagOfWordsConfig, BagOfWordsObjective, scale_loss

OBJECTIVE = BagOfWordsObjective(BagOfWordsConfig(kind="bag_of_words", scale_coefficient=0.5))


def _batch(weights, row_images, is_padding=False):
    count = max((index for row in row_images for index in row), default=-1) + 1
    batch = make_batch(weights, is_padding=is_padding)
    return replace(batch, row_images=row_images, images=tuple(ImageReference(f"{n}.png") for n in range(count)))


def test_terms_and_weights_by_hand():
    batch = _batch([[None, 2.0, 0.5], [None, None, 1.0]], ((0,), (1,)))
    scores = Scores(word_logprobs=torch.tensor([-1.0, -2.0, -3.0]), picture_scales=torch.tensor([math.e, 0.5]))
    terms = OBJECTIVE.terms(scores, batch, None)
    assert terms["bag_of_words"].item() == pytest.approx(2.0 + 1.0 + 3.0)
    assert terms["picture_scale"].item() == pytest.approx(1.0 + math.log(2) ** 2)
    weights = OBJECTIVE.weights(batch, Progress(0, 1))
    assert weights["bag_of_words"].item() == 3.5 and weights["picture_scale"].item() == 2.0
    assert OBJECTIVE.coefficients == {"bag_of_words": 1.0, "picture_scale": 0.5}
    total, count = OBJECTIVE.metrics(scores, batch)["picture_token_scale"]
    assert (total / count).item() == pytest.approx((math.e + 0.5) / 2)


def test_a_picture_of_two_rows_counts_as_often_in_one_batch_as_in_two():
    scales, logprobs = torch.tensor([3.0]), torch.tensor([-1.0, -2.0])
    whole = _batch([[None, 1.0], [None, 1.0]], ((0,), (0,)))
    part = _batch([[None, 1.0]], ((0,),))
    together = OBJECTIVE.terms(Scores(word_logprobs=logprobs, picture_scales=scales), whole, None)
    apart = [OBJECTIVE.terms(Scores(word_logprobs=item[None], picture_scales=scales), part, None) for item in logprobs]
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(item[name].item() for item in apart))
    weight = OBJECTIVE.weights(whole, Progress(0, 1))["picture_scale"].item()
    assert weight == 2 * OBJECTIVE.weights(part, Progress(0, 1))["picture_scale"].item()


def test_a_padding_batch_counts_nothing():
    batch = _batch([[None, 1.0]], ((0,),), is_padding=True)
    scores = Scores(word_logprobs=torch.tensor([-1.0]), picture_scales=torch.tensor([3.0]))
    assert all(value.item() == 0 for value in OBJECTIVE.terms(scores, batch, None).values())
    assert all(value.item() == 0 for value in OBJECTIVE.weights(batch, Progress(0, 1)).values())
    assert all(item.item() == 0 for pair in OBJECTIVE.metrics(scores, batch).values() for item in pair)


def test_the_scale_term_is_smallest_at_the_size_of_word_embeddings():
    scales = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    scale_loss(scales).backward()
    assert scales.grad is not None
    torch.testing.assert_close(scales.grad, 2 * scales.detach().log() / scales.detach())


def test_values_out_of_range_are_refused():
    for wrong in ({"temperature": 0}, {"scale_coefficient": -1}):
        with pytest.raises(ValidationError, match="greater than"):
            BagOfWordsConfig(kind="bag_of_words", **wrong)
