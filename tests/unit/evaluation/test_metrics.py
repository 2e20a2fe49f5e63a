"""Numbers worked by hand."""

import pytest
import torch

from triptych.evaluation.metrics import exact_match, normalise_answer, recall_at_k


def test_recall_counts_a_query_as_found_when_any_of_its_k_nearest_is_right() -> None:
    # Cosines of the three queries with the candidates (1, 0) and (0, 1): query 2 is nearer to the wrong one.
    queries = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
    candidates = torch.tensor([[5.0, 0.0], [0.0, 0.5]])
    query_keys, candidate_keys = torch.tensor([7, 8, 8]), torch.tensor([7, 8])
    assert recall_at_k(queries, candidates, query_keys, candidate_keys, 1) == pytest.approx(2 / 3)
    assert recall_at_k(queries, candidates, query_keys, candidate_keys, 2) == 1.0


@pytest.mark.requirement("B-6")
def test_recall_takes_an_equal_caption_for_right() -> None:
    embeddings = torch.eye(3)
    twin = embeddings[[1, 0, 2]]
    keys = torch.tensor([4, 4, 9])
    assert recall_at_k(embeddings, twin, keys, keys, 1) == 1.0
    distinct = torch.tensor([1, 2, 3])
    assert recall_at_k(embeddings, twin, distinct, distinct, 1) == pytest.approx(1 / 3)


def test_recall_refuses_more_neighbours_than_candidates() -> None:
    with pytest.raises(ValueError, match="recall@3"):
        recall_at_k(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2), 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(" The  Dog. ", "dog"), ("A cat!", "cat"), ("ｄｏｇ", "dog"), ("another", "another"), ("狗。", "狗")],
)
def test_answers_are_compared_without_case_article_and_punctuation(given: str, expected: str) -> None:
    assert normalise_answer(given) == expected
    assert exact_match(given, expected)
    assert not exact_match(given, "bird")
