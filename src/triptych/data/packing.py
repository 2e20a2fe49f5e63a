"""Which examples of a window share a forward pass: trees stay whole, and none costs more than the budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from triptych.core.types import Example
from triptych.data.sharing import Tree, plant


@dataclass(frozen=True)
class Budget:
    """What a micro-batch may hold."""

    examples: int | None = None
    """Most examples."""
    tokens: int | None = None
    """Most tokens that are computed."""
    packed: bool = True
    """Trees are computed packed, so that trunks count once and padding nothing; otherwise rows times the longest."""

    def allows(self, load: Load) -> bool:
        """Whether this fits one micro-batch."""
        if self.examples is not None and load.examples > self.examples:
            return False
        return self.tokens is None or self.cost(load) <= self.tokens

    def cost(self, load: Load) -> int:
        """Tokens that are computed."""
        return load.tokens if self.packed else load.rows * load.longest


@dataclass(frozen=True)
class Load:
    """What trees put into a micro-batch."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    """Each trunk once."""
    longest: int = 0
    """Tokens of the longest row."""

    def with_tree(self, tree: Tree) -> Load:
        """With one more tree."""
        return Load(
            self.examples + len(tree.examples),
            self.rows + tree.rows,
            self.tokens + tree.tokens,
            max(self.longest, tree.longest),
        )


def split_examples(examples: Iterable[Example], budget: Budget, by_length: bool) -> Iterator[list[Example]]:
    """Yield the examples of each micro-batch, as soon as it is known.

    Examples that follow each other and share a beginning are one tree, split only where it alone is over the budget. An
    example over the budget of tokens gets a micro-batch of its own.

    Args:
        examples: read as they are needed: who keeps less of a micro-batch than its examples never holds all of them.
        by_length: trees of like length together, so that rows need little padding, which reads all before the first
            micro-batch; otherwise in order.
    """
    trees = _trees_within(examples, budget)
    batch: list[Example] = []
    load = Load()
    for tree in sorted(trees, key=lambda tree: tree.longest) if by_length else trees:
        more = load.with_tree(tree)
        if batch and not budget.allows(more):
            yield batch
            batch = []
            more = Load().with_tree(tree)
        batch += tree.examples
        load = more
    if batch:
        yield batch


def _trees_within(examples: Iterable[Example], budget: Budget) -> Iterator[Tree]:
    tree: Tree | None = None
    for example in examples:
        longer = tree.with_example(example) if tree is not None else None
        if longer is not None and budget.allows(Load().with_tree(longer)):
            tree = longer
            continue
        if tree is not None:
            yield tree
        tree = plant(example)
    if tree is not None:
        yield tree
