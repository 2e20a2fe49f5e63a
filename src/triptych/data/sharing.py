"""What examples have in common: those about one picture are one tree, computed once up to where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from triptych.core.types import Branch, Example, TokenKind


@dataclass(frozen=True)
class Tree:
    """Examples that begin with the same tokens and pictures."""

    examples: tuple[Example, ...]
    trunk: int
    """Tokens that all rows share; for a single example, those of its own trunk."""
    rows: int
    """Rows it expands to."""
    row_tokens: int
    """Tokens of those rows together."""

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the trunk once, and what follows it in every row."""
        return self.row_tokens - (self.rows - 1) * self.trunk

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(example.max_row_tokens for example in self.examples)

    def with_example(self, example: Example) -> Tree | None:
        """The tree with one more example; None where that would save nothing.

        Examples share up to where their tokens differ, whole equal pictures only, and at least one of them.
        """
        alone = plant(example)
        shared = min(self.trunk, _shared_length(self.examples[0], example))
        joined = Tree((*self.examples, example), shared, self.rows + alone.rows, self.row_tokens + alone.row_tokens)
        return joined if shared and joined.tokens < self.tokens + alone.tokens else None


def plant(example: Example) -> Tree:
    """The tree of a single example."""
    return Tree((example,), len(example.trunk.input_ids), len(example.branches), example.num_tokens)


def find_trees(examples: Iterable[Example]) -> list[Tree]:
    """Examples in order; each joins the tree before it where that saves tokens."""
    trees: list[Tree] = []
    for example in examples:
        longer = trees[-1].with_example(example) if trees else None
        if longer is None:
            trees.append(plant(example))
        else:
            trees[-1] = longer
    return trees


def _shared_length(first: Example, other: Example) -> int:
    """Tokens that the trunks of two examples have in common, whole equal pictures only; 0 without a common picture.

    Where pictures touch, their borders are not known and nothing is shared.
    """
    ours, others = _identities(first), _identities(other)
    if not ours or not others or ours[0] != others[0]:
        return 0  # as found below, but most neighbours are about different pictures, and looking closer takes long
    runs = _picture_runs(first.trunk)
    if not runs:
        return 0
    limit = min(len(first.trunk.input_ids), len(other.trunk.input_ids))
    differs = (first.trunk.input_ids[:limit] != other.trunk.input_ids[:limit]).nonzero()
    length = int(differs[0]) if len(differs) else limit
    pictures = 0
    for (start, stop), left, right in zip(runs, ours, others, strict=False):
        if start >= length:
            break
        if left != right or stop > length:
            length = start
            break
        pictures += 1
    # A picture of the other that is none of the first's would lie behind the first's last one.
    return length if pictures else 0


def _identities(example: Example) -> Sequence[object]:
    return [example.images[index].identity for index in example.trunk.images]


def _picture_runs(trunk: Branch) -> list[tuple[int, int]]:
    """[start, stop) of the tokens of each picture; none where pictures touch."""
    is_image = (trunk.kinds == int(TokenKind.IMAGE)).int()
    border = is_image.new_zeros(1)
    steps = torch.diff(is_image, prepend=border, append=border)
    runs = list(zip((steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist(), strict=True))
    return runs if len(runs) == len(trunk.images) else []
