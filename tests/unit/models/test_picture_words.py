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


def _shares(token: Tensor, table: Tensor, ids: list[int], temperature: float, silence: float) -> list[Tensor]:
    """Probabilities of the words and, last, of silence."""
    scores = [(token @ table[word]) / (token.norm() * table[word].norm()) / temperature for word in ids]
    powers = [torch.exp(score) for score in scores] + [
        torch.tensor(math.exp(silence / temperature), dtype=torch.float64)
    ]
    return [power / sum(powers) for power in powers]


def test_logprobs_distances_and_gradients_equal_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 6, dtype=torch.float64)
    embeddings = nn.Embedding.from_pretrained(table)
    ids = [2, 3, 7, 11]
    pictures = [torch.randn(count, 6, dtype=torch.float64, requires_grad=True) for count in (2, 3, 1)]
    batch = _batch([[IGNORE, 7, 3, IGNORE], [IGNORE, IGNORE, 11, 5], [IGNORE, 2, 7, IGNORE]], ((0,), (1, 2), (0,)))
    spoken, silent, distances = PictureWords(ids, 0.3, 0.2)(batch, pictures, embeddings)
    shares = [[_shares(token, table, ids, 0.3, 0.2) for token in picture] for picture in pictures]

    def mean(row: int, column: int) -> Tensor:
        found = [share[column] for index in batch.row_images[row] for share in shares[index]]
        return torch.log(sum(found) / len(found))

    by_hand = [mean(0, 2), mean(0, 1), mean(1, 3), torch.zeros((), dtype=torch.float64), mean(2, 0), mean(2, 2)]
    torch.testing.assert_close(spoken, torch.stack(by_hand), rtol=1e-12, atol=1e-12)  # 5 is not among the words
    torch.testing.assert_close(silent, torch.stack([mean(row, 4) for row in range(3)]), rtol=1e-12, atol=1e-12)
    size = table[ids].square().sum(dim=1).mean()
    targets = [[int(torch.stack(share).argmax()) for share in picture] for picture in shares]
    assert {4} < {target for picture in targets for target in picture}  # some tokens name words, some nothing
    meant = [
        torch.stack(
            [table[ids[t]] if t < 4 else torch.zeros_like(token) for t, token in zip(picture, tokens, strict=True)]
        )
        for picture, tokens in zip(targets, pictures, strict=True)
    ]
    far = [(one - other).square().sum(dim=1).mean() / size for one, other in zip(pictures, meant, strict=True)]
    torch.testing.assert_close(distances, torch.stack(far), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((spoken.sum() + 2 * silent.sum() + 3 * distances.sum()), pictures, retain_graph=True)
    expected = torch.stack(by_hand).sum() + 2 * sum(mean(row, 4) for row in range(3)) + 3 * torch.stack(far).sum()
    for one, other in zip(ours, torch.autograd.grad(expected, pictures), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_distances_pull_pictures_to_words_and_not_words_to_pictures() -> None:
    embeddings = nn.Embedding(5, 6)
    picture = embeddings.weight.detach()[3:4].mul(0.5).requires_grad_()
    batch = _batch([[IGNORE, 3]], ((0,),))
    _, _, distances = PictureWords(range(5), 0.1, 0.3)(batch, [picture], embeddings)
    distances.sum().backward()
    assert picture.grad is not None and (picture.grad * picture).sum() < 0  # a step makes it longer, toward the word
    assert embeddings.weight.grad is None


def test_the_scorer_runs_pictures_only_and_gives_the_connector_gradients() -> None:
    model, tokenizer, image_processor = tiny_family("llava")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    batch = batch_of(
        ((noise(seed=1), "what?", Answer("a cat")), (noise(seed=2), "say", Answer("dog"))), tokenizer, pictures
    )
    ids = sorted(set(batch.labels[batch.supervised].tolist()))
    needs = frozenset({"word_logprobs", "silence_logprobs", "picture_distances"})
    scorer = VlmScorer(model, find_components(model), needs=needs, pictures=pictures, words=PictureWords(ids, 0.1, 0.3))
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
        words = PictureWords([1], 0.1, 0.3) if "token_logprobs" in needs else None
        with pytest.raises(ValueError, match="need `words`, and are computed without other fields"):
            VlmScorer(model, find_components(model), needs=frozenset(needs), words=words)
