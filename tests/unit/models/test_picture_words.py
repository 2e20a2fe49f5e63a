"""Picture tokens as words: against loops over the formula, and inside the scorer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import Answer, batch_of, noise, tiny_family
from tests.unit.objectives.batches import make_batch
from triptych.core.types import IGNORE, Batch
from triptych.models.components import find_components
from triptych.models.picture_words import SHORT, PictureWords, ReadingRules
from triptych.models.pictures import make_pictures
from triptych.models.vlm import VlmScorer


def _batch(labels: list[list[int]], row_images: tuple[tuple[int, ...], ...]) -> Batch:
    batch = make_batch([[1.0 if label != IGNORE else None for label in row] for row in labels])
    return replace(batch, labels=torch.tensor(labels), row_images=row_images)


def _shares(
    token: Tensor, table: Tensor, ids: list[int], temperature: float, silence: float, shortest: Tensor
) -> list[Tensor]:
    """Probabilities of the words and, last, of silence."""
    length = max(token.norm(), shortest)
    scores = [(token @ table[word]) / (length * table[word].norm()) for word in ids]
    scores.append(1 - (1 - silence) * torch.clamp(token.norm() / shortest, max=1))
    powers = [torch.exp(score / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


def test_logprobs_and_gradients_equal_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 6, dtype=torch.float64)
    ids = [2, 3, 7, 11]
    pictures = [torch.randn(count, 6, dtype=torch.float64) for count in (2, 3, 1)]
    pictures[1][0] *= 0.1  # a short one
    pictures = [picture.requires_grad_() for picture in pictures]
    batch = _batch([[IGNORE, 7, 3, IGNORE], [IGNORE, IGNORE, 11, 5], [IGNORE, 2, 7, IGNORE]], ((0,), (1, 2), (0,)))
    scores = PictureWords(ids, ReadingRules(0.3, 0.2))(batch, pictures, nn.Embedding.from_pretrained(table))
    shortest = SHORT * table[ids].square().sum(dim=1).mean().sqrt()
    assert pictures[1][0].norm() < shortest < pictures[2][0].norm()
    shares = [[_shares(token, table, ids, 0.3, 0.2, shortest) for token in picture] for picture in pictures]

    def mean(row: int, column: int) -> Tensor:
        found = [share[column] for index in batch.row_images[row] for share in shares[index]]
        return torch.log(sum(found) / len(found))

    by_hand = [mean(0, 2), mean(0, 1), mean(1, 3), torch.zeros((), dtype=torch.float64), mean(2, 0), mean(2, 2)]
    silent = torch.stack([mean(row, 4) for row in range(3)])
    assert scores.word_logprobs is not None and scores.silence_logprobs is not None
    torch.testing.assert_close(scores.word_logprobs, torch.stack(by_hand), rtol=1e-12, atol=1e-12)  # 5 is no word
    torch.testing.assert_close(scores.silence_logprobs, silent, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(
        scores.word_logprobs.sum() + 2 * scores.silence_logprobs.sum(), pictures, retain_graph=True
    )
    expected = torch.autograd.grad(torch.stack(by_hand).sum() + 2 * silent.sum(), pictures)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_distances_reach_to_the_words_of_the_row_with_their_contexts_and_to_nothing() -> None:
    table = torch.eye(8, dtype=torch.float64)
    ids = [0, 1, 2, 4]  # 4 is told apart from, but its weight is 0
    rules = ReadingRules(temperature=0.5, silence=0.3, context=0.4, silent_commitment=0.25)
    # "a dog (0) left (4), dog (0) right (5)" and "right (5) cat (1)"; no token is like the cat, and 2 is in no row.
    labels = [[IGNORE, 3, 0, 4, 0, 5], [IGNORE, 5, 1, IGNORE, IGNORE, IGNORE]]
    batch = make_batch([[None, 0.0, 1.0, 0.0, 1.0, 0.0], [None, 0.0, 1.0, None, None, None]])
    context = torch.tensor([9.0, 0.0, 1.0, 0.0, 2.0, 3.0, 0.0])
    batch = replace(batch, labels=torch.tensor(labels), row_images=((0,), (1,)), token_values={"context": context})
    left, right = table[0] + 0.3 * table[4], table[0] * 0.9 + 0.6 * table[5]
    quiet = 0.1 * table[1]
    small = 0.55 * table[0]  # nearer to nothing than to what it names
    pictures = [torch.stack([left, right, quiet, small]).requires_grad_(), (table[2] * 1.5)[None].requires_grad_()]
    scores = PictureWords(ids, rules)(batch, pictures, nn.Embedding.from_pretrained(table))
    assert scores.picture_distances is not None
    targets = [table[0] + 0.4 * table[4], table[0] + 0.8 * table[5], torch.zeros(8), table[0] + 0.4 * table[4]]
    shares = [_shares(token, table, ids, 0.5, 0.3, torch.tensor(0.5)) for token in pictures[0]]
    factors = [shares[0][0], shares[1][0], shares[2][-1] * 0.25, shares[3][0]]
    first = [
        factor.detach() * (token - target).square().sum()
        for factor, token, target in zip(factors, pictures[0], targets, strict=True)
    ]
    # The second row's token is like a word of no row, so nothing is what it names most among what its row asks for.
    alone = _shares(pictures[1][0], table, ids, 0.5, 0.3, torch.tensor(0.5))
    assert alone[2] > alone[-1] > alone[1]
    second = 0.25 * alone[-1].detach() * pictures[1][0].square().sum()
    by_hand = torch.stack([sum(first) / 4, second])
    torch.testing.assert_close(scores.picture_distances, by_hand, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(scores.picture_distances.sum(), pictures, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(by_hand.sum(), pictures), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_distances_pull_pictures_to_words_and_not_words_to_pictures() -> None:
    embeddings = nn.Embedding(5, 6)
    picture = embeddings.weight.detach()[3:4].mul(0.5).requires_grad_()
    batch = _batch([[IGNORE, 3]], ((0,),))
    distances = PictureWords(range(5), ReadingRules(0.1, 0.3))(batch, [picture], embeddings).picture_distances
    assert distances is not None
    distances.sum().backward()
    assert picture.grad is not None and (picture.grad * picture).sum() < 0  # a step makes it longer, toward the word
    assert embeddings.weight.grad is None


def test_a_batch_without_one_word_is_silent() -> None:
    batch = _batch([[IGNORE, 4], [IGNORE, IGNORE]], ((0,), (1,)))
    pictures = [torch.randn(2, 6, requires_grad=True), torch.randn(1, 6, requires_grad=True)]
    scores = PictureWords([1], ReadingRules(0.1, 0.3))(batch, pictures, nn.Embedding(5, 6))
    assert scores.word_logprobs is not None and scores.word_logprobs.tolist() == [0.0]
    assert scores.silence_logprobs is not None and scores.picture_distances is not None
    (scores.silence_logprobs.sum() + scores.picture_distances.sum()).backward()
    assert all(picture.grad is not None and picture.grad.isfinite().all() for picture in pictures)


def test_the_scorer_runs_pictures_only_and_gives_the_connector_gradients() -> None:
    model, tokenizer, image_processor = tiny_family("llava")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    batch = batch_of(
        ((noise(seed=1), "what?", Answer("a cat")), (noise(seed=2), "say", Answer("dog"))), tokenizer, pictures
    )
    ids = sorted(set(batch.labels[batch.supervised].tolist()))
    needs = frozenset({"word_logprobs", "silence_logprobs", "picture_distances"})
    scorer = VlmScorer(
        model, find_components(model), needs=needs, pictures=pictures, words=PictureWords(ids, ReadingRules(0.1, 0.3))
    )
    calls: list[int] = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    scores = scorer(batch)
    assert scores.word_logprobs is not None and scores.silence_logprobs is not None and scores.token_logprobs is None
    assert scores.word_logprobs.shape == batch.supervised_rows.shape and scores.silence_logprobs.shape == (2,)
    assert scores.picture_distances is not None and scores.picture_distances.shape == (2,)
    assert (scores.word_logprobs < 0).all() and not calls
    (-scores.word_logprobs.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.model.multi_modal_projector.parameters())
    assert "words.word_ids" not in scorer.state_dict()


def test_words_are_required_and_stand_alone() -> None:
    model, _, _ = tiny_family("llava")
    for needs in ({"word_logprobs"}, {"word_logprobs", "token_logprobs"}):
        words = PictureWords([1], ReadingRules(0.1, 0.3)) if "token_logprobs" in needs else None
        with pytest.raises(ValueError, match="need `words`, and are computed without other fields"):
            VlmScorer(model, find_components(model), needs=frozenset(needs), words=words)
