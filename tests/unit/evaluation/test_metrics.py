"""Numbers worked by hand."""

import pytest
import torch

from triptych.data.scene_questions import describe
from triptych.data.scenes import sample_scene
from triptych.evaluation.metrics import (
    bare_number,
    bootstrap_interval,
    exact_match,
    normalise_answer,
    number_match,
    number_of,
    objects_match,
    objects_of,
    recall_at_k,
    share_interval,
)


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


def test_numbers_in_words_and_digits() -> None:
    said = ["Two.", "3 dogs", "There are ten of them", "none", "a dog", "dogs", "two or three", ""]
    assert [number_of(text) for text in said] == [2, 3, 10, 0, None, None, None, None]
    assert number_match("3", "three") and not number_match("four", "three")
    assert number_match("Dog", "dog") and not number_match("two dogs", "dog")


def test_captions_are_taken_apart_into_things() -> None:
    assert objects_of("A dog, two cats and a fox.") == {"dog": 1, "cat": 2, "fox": 1}
    assert objects_of("three strawberries and 2 foxes") == {"strawberry": 3, "fox": 2}
    assert objects_of("two buses, two houses and three shoes") == {"bus": 2, "house": 2, "shoe": 3}
    assert objects_of("dog") == {"dog": 1} and objects_of("") == {}
    # Characters that are digits to Python and no numbers to int().
    assert objects_of("\u2776 dog") == {"\u2776 dog": 1} and bare_number("\u2776") is None
    assert objects_match("two cats and a dog", "A dog and two cats.")
    assert objects_match("a cat and a cat", "two cats")
    assert not objects_match("a dog and three cats", "A dog and two cats.")
    assert not objects_match("a dog", "A dog and two cats.")
    assert not objects_match("a dog, two cats and a fox", "A dog and two cats.")


def test_every_caption_of_the_scenes_is_read_back() -> None:
    for number in range(300):
        for split in ("train", "combinations"):
            scene = sample_scene(split, 3, number)
            assert objects_of(f"{describe(scene).capitalize()}.") == scene.counts


def test_the_interval_of_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(400, generator=generator) < 0.3).double().tolist()
    mean = sum(values) / 400
    low, high = bootstrap_interval(values, [str(number) for number in range(400)])
    # The normal interval of a share, which the bootstrap comes near for 400 answers.
    half = 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert low == pytest.approx(mean - half, abs=0.01) and high == pytest.approx(mean + half, abs=0.01)
    assert bootstrap_interval(values, [str(number) for number in range(400)]) == (low, high)


def test_the_interval_of_answers_that_are_all_alike_has_a_width() -> None:
    """Wilson's for 0 of 20 by hand: up to 3.8415 / 23.8415."""
    clusters = [str(number) for number in range(20)]
    assert share_interval([0.0] * 20, clusters) == (0.0, pytest.approx(0.16113, abs=1e-5))
    assert share_interval([1.0] * 20, clusters) == (pytest.approx(0.83887, abs=1e-5), 1.0)
    assert share_interval([0.0] * 20, ["one picture"] * 20) == (0.0, pytest.approx(0.79346, abs=1e-5))
    mixed = [1.0, 0.0] * 10
    assert share_interval(mixed, clusters) == bootstrap_interval(mixed, clusters)


def test_answers_about_one_sample_are_drawn_together() -> None:
    values = [1.0] * 50 + [0.0] * 50
    alone = bootstrap_interval(values, [str(number) for number in range(100)])
    together = bootstrap_interval(values, [str(number // 25) for number in range(100)])
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([], [])
    with pytest.raises(ValueError, match="2 values, 1 clusters"):
        bootstrap_interval([1.0, 0.0], ["a"])


def test_a_bare_number_is_the_whole_answer() -> None:
    found = {text: bare_number(text) for text in ("3", "Three.", " four ", "no", "a", "two cats", "zero", "")}
    assert found == {"3": 3, "Three.": 3, " four ": 4, "no": None, "a": None, "two cats": None, "zero": 0, "": None}
