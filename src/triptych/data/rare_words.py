"""Which words of answers are rare enough to be looked for in pictures, so that `dog` counts and `the` does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from triptych.core.errors import DataError, Problem
from triptych.core.types import CONTEXT, IGNORE, Branch, Example, Sample
from triptych.data.loader import Rows

COUNTED_ROWS = 4000
"""Rows that are read, evenly spread over all, to count words."""


@dataclass(frozen=True)
class RareWords:
    """Tokens that few answers have, and how telling the others are."""

    tokens: frozenset[int]
    common: Mapping[int, float] = field(default_factory=dict)
    """Natural log of the answers over those with the token, for tokens that are not rare: 0 if all have it."""

    def weigh(self, example: Example) -> Example:
        """The example with the weight 0 at every supervised token that is not rare; occurrences all count.

        A token that was never counted weighs nothing either: no picture token is compared with it. `token_values` get
        what the common tokens weigh as context, 0 for the rare ones.

        Raises:
            DataError: the row has no picture to read words from.
        """
        if not example.images:
            remedy = "leave rows of text alone out of this stage"
            raise DataError(
                Problem("the row has no picture", file=example.origin.file, line=example.origin.line, remedy=remedy)
            )
        return replace(
            example,
            trunk=self._weighed(example.trunk),
            branches=tuple(self._with_context(example.trunk, branch) for branch in example.branches),
        )

    def _weighed(self, branch: Branch) -> Branch:
        is_rare = torch.tensor([token in self.tokens for token in branch.labels.tolist()], dtype=torch.bool)
        return replace(branch, weights=branch.weights * is_rare)

    def _with_context(self, trunk: Branch, branch: Branch) -> Branch:
        labels = [token for part in (trunk, branch) for token in part.labels.tolist() if token != IGNORE]
        context = torch.tensor([self.common.get(token, 0.0) for token in labels])
        return replace(self._weighed(branch), token_values={**branch.token_values, CONTEXT: context})


def find_rare_words(
    datasets: Sequence[Rows], encode: Callable[[Sample], Example], share: float, rows: int = COUNTED_ROWS
) -> RareWords:
    """Read rows and keep the tokens of few answers; rows that cannot be used are left to the loader.

    Args:
        datasets: the training data.
        encode: makes the tokens of a row.
        share: of the answers, that a rare token is in at most.
        rows: how many to read, evenly spread over all data sets together.

    Raises:
        DataError: no row that was read can be used (the first rows' problems), or no token is rare.
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
    found = frozenset(token for token, count in frequencies.items() if count <= share * documents)
    if not found:
        message = f"every token of {documents} answers is in more than {share:.0%} of them"
        raise DataError(
            Problem(message, key="objective.common_share", remedy="raise it, or use more different answers")
        )
    return RareWords(found, {t: math.log(documents / n) for t, n in frequencies.items() if t not in found})


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
