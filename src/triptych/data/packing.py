"""Which examples of a window share a forward pass: trees stay whole, and none costs more than the budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from triptych.core.types import Example


@dataclass(frozen=True)
class Budget:
    """What a micro-batch may hold."""

    examples: int | None = None
    """Most examples."""
    tokens: int | None = None
    """Most tokens, shared trunks counted once."""


def split_examples(examples: Sequence[Example], budget: Budget, by_length: bool) -> list[list[Example]]:
    """The examples of each micro-batch.

    Examples that follow each other and begin with the same picture are one tree, which is split only where it alone is
    over the budget. An example over the budget of tokens gets a micro-batch of its own.

    Args:
        by_length: trees of like size together, so that a micro-batch of rows has little padding; otherwise in order.
    """
    trees = [part for tree in _trees(examples) for part in _cut(tree, budget)]
    if by_length:
        trees.sort(key=lambda tree: max(example.max_row_tokens for example in tree))
    batches: list[list[Example]] = []
    room = Budget(0, 0)
    for tree in trees:
        size, tokens = len(tree), tree_tokens(tree)
        if not _fits(Budget(size, tokens), room):
            batches.append([])
            room = budget
        batches[-1] += tree
        room = Budget(_minus(room.examples, size), _minus(room.tokens, tokens))
    return batches


def tree_tokens(tree: Sequence[Example]) -> int:
    """Tokens that are computed for examples of one tree: what lies before the end of their last shared picture once.

    `collate` may find a longer trunk; this counts no token too few.
    """
    shared = shared_tokens(tree)
    return shared + sum(_own_tokens(example, shared) for example in tree)


def shared_tokens(tree: Sequence[Example]) -> int:
    """Length of the prefix that the trunks of all examples have in common; 0 for a single example with one branch."""
    first = tree[0].trunk.input_ids
    if len(tree) == 1:
        return len(first) if len(tree[0].branches) > 1 else 0
    length = min(len(example.trunk.input_ids) for example in tree)
    for example in tree[1:]:
        differs = (first[:length] != example.trunk.input_ids[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
    return length


def _own_tokens(example: Example, shared: int) -> int:
    trunk = len(example.trunk.input_ids)
    return sum(trunk - shared + len(branch.input_ids) for branch in example.branches)


def _trees(examples: Sequence[Example]) -> list[list[Example]]:
    def picture(numbered: tuple[int, Example]) -> object:
        number, example = numbered
        return example.images[0].identity if example.trunk.images else number

    return [[example for _, example in run] for _, run in itertools.groupby(enumerate(examples), picture)]


def _cut(tree: list[Example], budget: Budget) -> list[list[Example]]:
    """Parts of a tree that fit the budget each, in order."""
    parts: list[list[Example]] = []
    for example in tree:
        longer = [*parts[-1], example] if parts else []
        if longer and _fits(Budget(len(longer), tree_tokens(longer)), budget):
            parts[-1] = longer
        else:
            parts.append([example])
    return parts


def _fits(size: Budget, room: Budget) -> bool:
    return all(
        most is None or (have is not None and have <= most)
        for have, most in ((size.examples, room.examples), (size.tokens, room.tokens))
    )


def _minus(room: int | None, used: int) -> int | None:
    return None if room is None else room - used
