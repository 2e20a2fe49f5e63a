"""Lexical alignment: values by hand, and the same however a window is split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.unit.objectives.batches import make_batch
from triptych.core.types import ImageReference, Progress, Scores, TokenKind
from triptych.objectives.bag_of_words import BagOfWordsConfig, BagOfWordsObjective

CONFIG = BagOfWordsConfig(kind="bag_of_words", tokens_per_word=1.5, commitment_coefficient=0.5)
OBJECTIVE = BagOfWordsObjective(CONFIG)


def _batch(weights, row_images, picture_tokens, is_padding=False):
    """Rows whose last columns hold the given numbers of picture tokens."""
    count = max((index for row in row_images for index in row), default=-1) + 1
    batch = make_batch([[*row, *[None] * max(picture_tokens)] for row in weights], is_padding=is_padding)
    kinds = batch.kinds.clone()
    for row, tokens in enumerate(picture_tokens):
        kinds[row, len(weights[row]) : len(weights[row]) + tokens] = TokenKind.IMAGE
    images = tuple(ImageReference(f"{n}.png") for n in range(count))
    return replace(batch, row_images=row_images, images=images, kinds=kinds)


def _scores(spoken, silent, distances):
    return Scores(
        word_logprobs=torch.tensor(spoken),
        silence_logprobs=torch.tensor(silent),
        picture_distances=torch.tensor(distances),
    )


def test_terms_and_weights_by_hand():
    batch = _batch([[None, 2.0, 0.5], [None, None, 1.0]], ((0,), (1,)), (9, 1))
    scores = _scores([-1.0, -2.0, -3.0], [-0.5, -0.25], [2.0, 0.5])
    terms = OBJECTIVE.terms(scores, batch, None)
    silent = 9 - 1.5 * 2.5  # the second row's word asks for more than its only token, so nothing is silent there
    assert terms["bag_of_words"].item() == pytest.approx(1.5 * (2.0 + 1.0 + 3.0) + silent * 0.5)
    assert terms["commitment"].item() == pytest.approx(2.5)
    weights = OBJECTIVE.weights(batch, Progress(0, 1))
    assert weights["bag_of_words"].item() == pytest.approx(9 + 1.5) and weights["commitment"].item() == 2.0
    assert OBJECTIVE.coefficients == {"bag_of_words": 1.0, "commitment": 0.5}
    total, count = OBJECTIVE.metrics(scores, batch)["silence"]
    assert (total / count).item() == pytest.approx((2.718281828**-0.5 + 2.718281828**-0.25) / 2)


def test_two_rows_of_one_picture_count_alike_in_one_batch_and_in_two():
    whole = _batch([[None, 1.0], [None, 1.0]], ((0,), (0,)), (4, 4))
    part = _batch([[None, 1.0]], ((0,),), (4,))
    together = OBJECTIVE.terms(_scores([-1.0, -2.0], [-0.5, -0.7], [3.0, 2.0]), whole, None)
    apart = [
        OBJECTIVE.terms(_scores([spoken], [silent], [far]), part, None)
        for spoken, silent, far in ((-1.0, -0.5, 3.0), (-2.0, -0.7, 2.0))
    ]
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(item[name].item() for item in apart))
        weight = OBJECTIVE.weights(whole, Progress(0, 1))[name].item()
        assert weight == 2 * OBJECTIVE.weights(part, Progress(0, 1))[name].item()


def test_a_padding_batch_counts_nothing():
    batch = _batch([[None, 1.0]], ((0,),), (4,), is_padding=True)
    scores = _scores([-1.0], [-1.0], [3.0])
    assert all(value.item() == 0 for value in OBJECTIVE.terms(scores, batch, None).values())
    assert all(value.item() == 0 for value in OBJECTIVE.weights(batch, Progress(0, 1)).values())
    assert all(item.item() == 0 for pair in OBJECTIVE.metrics(scores, batch).values() for item in pair)


def test_values_out_of_range_are_refused():
    for wrong in ({"temperature": 0}, {"commitment_coefficient": -1}, {"tokens_per_word": 0}, {"common_share": 0}):
        with pytest.raises(ValidationError, match="greater than"):
            BagOfWordsConfig(kind="bag_of_words", **wrong)
