"""Picture tokens as words: against loops over the formula, and inside the scorer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import Answer, batch_of, noise, tiny_family
from tests.unit.objectives.batches import make_batch
from triptych.core.types import IGNORE, Batch
from triptych.models.components import find_components
from triptych.models.picture_words import PictureWords
from triptych.models.pictures import make_pictures
from triptych.models.vlm import VlmScorer


def _batch(labels: list[list[int]], row_images: tuple[tuple[int, ...], ...]) -> Batch:
    batch = make_batch([[1.0 if label != IGNORE else None for label in row] for row in labels])
    return replace(batch, labels=torch.tensor(labels), row_images=row_images)


def _by_hand(batch: Batch, pictures: list[Tensor], table: Tensor, ids: list[int], temperature: float) -> list[Tensor]:
    found = []
    for row, shown in enumerate(batch.row_images):
        for label in batch.labels[row].tolist():
            if label == IGNORE:
                continue
            if label not in ids:
                found.append(torch.zeros((), dtype=torch.float64))
                continue
            shares = []
            for index in shown:
                for token in pictures[index]:
                    scores = [(token @ table[word]) / (token.norm() * table[word].norm()) / temperature for word in ids]
                    shares.append(torch.exp(scores[ids.index(label)]) / sum(torch.exp(score) for score in scores))
            found.append(torch.log(sum(shares) / len(shares)))
    return found


def test_word_logprobs_and_gradients_equal_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 6, dtype=torch.float64)
    embeddings = nn.Embedding.from_pretrained(table)
    ids = [2, 3, 7, 11]
    pictures = [torch.randn(count, 6, dtype=torch.float64, requires_grad=True) for count in (2, 3, 1)]
    batch = _batch([[IGNORE, 7, 3, IGNORE], [IGNORE, IGNORE, 11, 5], [IGNORE, 2, 7, IGNORE]], ((0,), (1, 2), (0,)))
    logprobs, scales = PictureWords(ids, 0.3)(batch, pictures, embeddings)
    expected = torch.stack(_by_hand(batch, pictures, table, ids, 0.3))
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    assert logprobs[3] == 0.0  # token 5 is not among the words
    factors = torch.arange(1.0, 7.0, dtype=torch.float64)
    ours = torch.autograd.grad((logprobs * factors).sum(), pictures, retain_graph=True)
    theirs = torch.autograd.grad((expected * factors).sum(), pictures)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    rms = math.sqrt(table[ids].square().mean())
    by_hand = [math.sqrt(picture.detach().square().mean()) / rms for picture in pictures]
    torch.testing.assert_close(scales, torch.tensor(by_hand, dtype=torch.float64))


def test_the_scorer_runs_pictures_only_and_gives_the_connector_gradients() -> None:
    model, tokenizer, image_processor = tiny_family("llava")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    batch = batch_of(
        ((noise(seed=1), "what?", Answer("a cat")), (noise(seed=2), "say", Answer("dog"))), tokenizer, pictures
    )
    ids = sorted(set(batch.labels[batch.supervised].tolist()))
    needs = frozenset({"word_logprobs", "picture_scales"})
    scorer = VlmScorer(model, find_components(model), needs=needs, pictures=pictures, words=PictureWords(ids, 0.1))
    calls: list[int] = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    scores = scorer(batch)
    assert scores.word_logprobs is not None and scores.picture_scales is not None and scores.token_logprobs is None
    assert scores.word_logprobs.shape == batch.supervised_rows.shape and scores.picture_scales.shape == (2,)
    assert (scores.word_logprobs < 0).all() and not calls
    (-scores.word_logprobs.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.model.multi_modal_projector.parameters())
    assert "words.word_ids" not in scorer.state_dict()


def test_words_are_required_and_stand_alone() -> None:
    model, _, _ = tiny_family("llava")
    for needs in ({"word_logprobs"}, {"word_logprobs", "token_logprobs"}):
        words = PictureWords([1], 0.1) if "token_logprobs" in needs else None
        with pytest.raises(ValueError, match="need `words`, and are computed without other fields"):
            VlmScorer(model, find_components(model), needs=frozenset(needs), words=words)
