"""Weights of words by how rare they are among answers, so that `dog` counts and `the` does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triptych.core.errors import DataError, Problem
from triptych.core.types import IGNORE, Branch, Example, Sample
from triptych.data.loader import Rows

COUNTED_ROWS = 4000
"""Rows that are read, evenly spread over all, to count words."""


@dataclass(frozen=True)
class WordWeights:
    """Inverse document frequency of token ids: ln(rows / rows whose answers have the token)."""

    rarity: Mapping[int, float]
    """Every token of the answers that were read -> its weight, 0 for a token of every answer."""

    def weigh(self, example: Example) -> Example:
        """The example with the weight of each supervised token times its rarity, repeated tokens counting once.

        A token that was never counted weighs nothing: no picture token is compared with it.

        Raises:
            DataError: the row has no picture to read words from.
        """
        if not example.images:
            remedy = "leave rows of text alone out of this stage"
            raise DataError(
                Problem("the row has no picture", file=example.origin.file, line=example.origin.line, remedy=remedy)
            )
        seen: set[int] = set()
        trunk = _weighed(example.trunk, self.rarity, seen)
        return replace(
            example,
            trunk=trunk,
            branches=tuple(_weighed(branch, self.rarity, set(seen)) for branch in example.branches),
        )


def count_words(datasets: Sequence[Rows], encode: Callable[[Sample], Example], rows: int = COUNTED_ROWS) -> WordWeights:
    """Read rows and count in how many answers each token appears; rows that cannot be used are left to the loader.

    Args:
        datasets: the training data.
        encode: makes the tokens of a row.
        rows: how many to read, evenly spread over all data sets together.

    Raises:
        DataError: no row that was read can be used; the first rows' problems.
    """
    total = sum(len(dataset) for dataset in datasets)
    frequencies: Counter[int] = Counter()
    documents = 0
    problems: list[Problem] = []
    for dataset, index in _spread(datasets, total, rows):
        try:
            example = encode(dataset.sample(index))
        except DataError as error:
            problems += error.problems
            continue
        for branch in example.branches:
            documents += 1
            frequencies.update(_answer_tokens(example.trunk) | _answer_tokens(branch))
    if not frequencies:
        raise DataError(problems[:5] or [Problem("there is no row to count words in")])
    return WordWeights({token: math.log(documents / count) for token, count in frequencies.items()})


def _spread(datasets: Sequence[Rows], total: int, rows: int) -> Iterable[tuple[Rows, int]]:
    stride = max(1, -(-total // rows))
    start = 0
    for dataset in datasets:
        first = -start % stride
        yield from ((dataset, index) for index in range(first, len(dataset), stride))
        start += len(dataset)


def _answer_tokens(branch: Branch) -> set[int]:
    labels = branch.labels
    return set(labels[labels != IGNORE].tolist())


def _weighed(branch: Branch, rarity: Mapping[int, float], seen: set[int]) -> Branch:
    factors: list[float] = []
    for token in branch.labels.tolist():
        counts = token != IGNORE and token not in seen
        factors.append(rarity.get(token, 0.0) if counts else 0.0)
        seen.add(token)
    weights: Tensor = branch.weights * torch.tensor(factors, dtype=branch.weights.dtype)
    return replace(branch, weights=weights)
