"""Rare words are kept with all their occurrences, rows without pictures are named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from triptych.core.errors import DataError, Problem
from triptych.core.types import IGNORE, Branch, Example, ImageReference, Origin, Sample
from triptych.data.rare_words import RareWords, find_rare_words


def _branch(labels: Sequence[int], weight: float = 1.0) -> Branch:
    ids = torch.tensor(labels, dtype=torch.long)
    weights = torch.where(ids != IGNORE, weight, 0.0)
    return Branch(ids, ids, torch.zeros(len(labels), dtype=torch.uint8), weights)


def _example(labels: Sequence[int], pictures: int = 1, weight: float = 1.0) -> Example:
    images = tuple(ImageReference(f"{number}.png") for number in range(pictures))
    trunk = _branch([IGNORE, IGNORE])
    return Example(trunk, (_branch(labels, weight),), images, ((8, 8),) * pictures, Origin("rows.json", 3))


class _Rows:
    """Rows that are already numbers: `encode` looks the answer up."""

    def __init__(self, answers: Sequence[Sequence[int] | None], start: int = 0) -> None:
        self.answers, self.start, self.asked = answers, start, []

    def __len__(self) -> int:
        return len(self.answers)

    def origin(self, index: int) -> Origin:
        return Origin("rows.json", index + 1)

    def fingerprint(self) -> dict[str, str]:
        return {}

    def sample(self, index: int) -> Sample:
        self.asked.append(index)
        if self.answers[index] is None:
            raise DataError(Problem(f"row {index} is broken"))
        return Sample((), Origin("rows.json", index + 1, id=json.dumps(self.answers[index])))


def _encode(sample: Sample) -> Example:
    return _example(json.loads(sample.origin.id))


def test_tokens_of_few_answers_are_rare_and_broken_rows_are_left_out() -> None:
    rows = _Rows([[5, 6, 9], [5, 5, 9], None, [7, 9]])
    found = find_rare_words([rows], _encode, share=0.67)
    assert found.tokens == {5, 6, 7} and found.common == {9: 0.0}
    found = find_rare_words([rows], _encode, share=0.34)
    assert found.tokens == {6, 7} and found.common == {5: pytest.approx(math.log(3 / 2)), 9: 0.0}
    with pytest.raises(DataError, match=r"common_share: every token of 3 answers is in more than 10% of them"):
        find_rare_words([rows], _encode, share=0.1)


def test_many_rows_are_read_evenly_over_all_data_sets() -> None:
    first, second = _Rows([[1]] * 10), _Rows([[2]] * 10)
    find_rare_words([first, second], _encode, share=1.0, rows=5)
    assert first.asked == [0, 4, 8] and second.asked == [2, 6]


def test_nothing_to_count_is_an_error_with_the_rows_problems() -> None:
    with pytest.raises(DataError, match="row 0 is broken"):
        find_rare_words([_Rows([None])], _encode, share=1.0)
    with pytest.raises(DataError, match="there is no row"):
        find_rare_words([_Rows([])], _encode, share=1.0)


def test_every_occurrence_of_a_rare_word_keeps_its_weight_and_other_tokens_lose_theirs() -> None:
    weighed = RareWords(frozenset({5, 6})).weigh(_example([5, 5, 8, 6, IGNORE], weight=3.0))
    assert weighed.branches[0].weights.tolist() == [3.0, 3.0, 0.0, 3.0, 0.0]
    assert torch.equal(weighed.branches[0].labels, _example([5, 5, 8, 6, IGNORE]).branches[0].labels)


def test_common_tokens_weigh_as_context_by_how_few_answers_have_them() -> None:
    example = replace(_example([5, 8, IGNORE, 9]), trunk=_branch([IGNORE, 8]))
    weighed = RareWords(frozenset({5}), {8: 0.5, 9: 0.1}).weigh(example)
    assert weighed.branches[0].token_values["context"].tolist() == pytest.approx([0.5, 0.0, 0.5, 0.1])
    assert weighed.trunk.weights.tolist() == [0.0, 0.0]


def test_a_row_without_a_picture_is_named() -> None:
    with pytest.raises(DataError, match=r"rows.json:3: the row has no picture"):
        RareWords(frozenset({5})).weigh(_example([5], pictures=0))
