"""Examples to a light `Batch`: trees are expanded to rows and right-padded; nothing is derived from token values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triptych.core.types import IGNORE, Batch, Branch, Example, ImageReference, Origin, TokenKind
from triptych.data.sharing import find_trees

DEFAULT_KIND_WEIGHTS: Mapping[TokenKind, float] = {
    TokenKind.RESPONSE: 1.0,
    TokenKind.END_OF_TURN: 1.0,
    TokenKind.BOX: 1.0,
    TokenKind.ENTITY: 1.0,
}
"""Loss weight of a supervised token by its kind; kinds not named weigh 0."""


@dataclass(frozen=True)
class _Row:
    """One branch behind its trunk."""

    input_ids: Tensor
    labels: Tensor
    kinds: Tensor
    weights: Tensor
    example_index: int
    images: tuple[int, ...]
    branch: Branch
    example: Example


def collate(examples: Sequence[Example], kind_weights: Mapping[TokenKind, float] | None = None) -> Batch:
    """Expand trees to rows, pad on the right, number the pictures, and find what rows share.

    A token's weight is its message and sample weight times the weight of its kind. The label of column 0 is dropped:
    nothing predicts the first token. A picture that occurs several times in the batch is listed once, and examples that
    follow each other and begin with the same picture become one tree, see `find_trees`.

    Args:
        examples: at least one.
        kind_weights: kind -> weight of its supervised tokens; kinds not named weigh 0. None: `DEFAULT_KIND_WEIGHTS`.

    Raises:
        ValueError: `token_values` are missing in some rows, or do not have one number per supervised token.
    """
    images: list[ImageReference] = []
    known: dict[tuple[object, ...], int] = {}
    rows: list[_Row] = []
    pairs: list[tuple[int, int]] = []
    pair_weights: list[float] = []
    for index, example in enumerate(examples):
        numbers = _number_images(example.images, images, known)
        first_row = len(rows)
        rows.extend(_expand(example, branch, index, numbers) for branch in example.branches)
        pairs.extend((first_row + pair.winner, first_row + pair.loser) for pair in example.pairs)
        pair_weights.extend(pair.weight for pair in example.pairs)
    trees = [(number, tree.trunk) for number, tree in enumerate(find_trees(examples)) for _ in range(tree.rows)]
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    longest = int(lengths.max())
    labels = _pad([row.labels for row in rows], longest, IGNORE)
    labels[:, 0] = IGNORE
    kinds = _pad([row.kinds for row in rows], longest, int(TokenKind.PADDING))
    weights = _pad([row.weights for row in rows], longest, 0) * _kind_table(kind_weights)[kinds.long()]
    return Batch(
        input_ids=_pad([row.input_ids for row in rows], longest, 0),
        labels=labels,
        weights=weights.masked_fill(labels == IGNORE, 0.0),
        kinds=kinds,
        lengths=lengths,
        example_index=torch.tensor([row.example_index for row in rows]),
        tree_index=torch.tensor([number for number, _ in trees]),
        trunk_lengths=torch.tensor([trunk for _, trunk in trees]),
        images=tuple(images),
        row_images=tuple(row.images for row in rows),
        origins=tuple(row.example.origin for row in rows),
        tasks=tuple(row.example.task for row in rows),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        pair_weights=torch.tensor(pair_weights, dtype=torch.float32),
        text_keys=torch.tensor([row.example.text_key for row in rows]),
        token_values=_join_token_values(rows, (labels != IGNORE).sum(dim=1)),
        facts=_join_facts(rows),
    )


def make_padding(batch: Batch) -> Batch:
    """The batch as one that counts nothing: all weights 0, `is_padding` set.

    Its rows stay real, so that the forward and backward pass touch the same modules as on the other ranks.
    """
    return replace(
        batch,
        weights=torch.zeros_like(batch.weights),
        pair_weights=torch.zeros_like(batch.pair_weights),
        is_padding=True,
    )


def blank_example() -> Example:
    """Two tokens of id 0 and one label, for a padding batch when no row is at hand."""
    trunk = Branch(
        input_ids=torch.zeros(1, dtype=torch.int64),
        labels=torch.full((1,), IGNORE),
        kinds=torch.full((1,), int(TokenKind.SPECIAL), dtype=torch.uint8),
        weights=torch.zeros(1),
    )
    branch = replace(trunk, labels=torch.zeros(1, dtype=torch.int64))
    return Example(trunk=trunk, branches=(branch,), images=(), image_sizes=(), origin=Origin("padding", 0))


def _expand(example: Example, branch: Branch, index: int, numbers: Sequence[int]) -> _Row:
    trunk = example.trunk
    return _Row(
        input_ids=torch.cat([trunk.input_ids, branch.input_ids]),
        labels=torch.cat([trunk.labels, branch.labels]),
        kinds=torch.cat([trunk.kinds, branch.kinds]),
        weights=torch.cat([trunk.weights, branch.weights]),
        example_index=index,
        images=tuple(numbers[image] for image in (*trunk.images, *branch.images)),
        branch=branch,
        example=example,
    )


def _number_images(
    references: Sequence[ImageReference], images: list[ImageReference], known: dict[tuple[object, ...], int]
) -> list[int]:
    """Append the new pictures of an example to `images`; return the position of each of its references there."""
    numbers = []
    for reference in references:
        key = reference.identity
        if key not in known:
            known[key] = len(images)
            images.append(reference)
        numbers.append(known[key])
    return numbers


def _pad(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    padded = rows[0].new_full((len(rows), length), value)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded


def _kind_table(kind_weights: Mapping[TokenKind, float] | None) -> Tensor:
    table = torch.zeros(len(TokenKind))
    for kind, weight in (DEFAULT_KIND_WEIGHTS if kind_weights is None else kind_weights).items():
        table[kind] = weight
    return table


def _join_token_values(rows: Sequence[_Row], counts: Tensor) -> dict[str, Tensor]:
    joined = {}
    for name in sorted({name for row in rows for name in row.branch.token_values}):
        parts = []
        for row, count in zip(rows, counts.tolist(), strict=True):
            values = row.branch.token_values.get(name)
            if values is None or len(values) != count:
                found = "none" if values is None else str(len(values))
                raise ValueError(f"{row.example.origin}: `{name}` has {found} values for {count} supervised tokens")
            parts.append(values.float())
        joined[name] = torch.cat(parts)
    return joined


def _join_facts(rows: Sequence[_Row]) -> dict[str, Tensor]:
    names = sorted({name for row in rows for name in row.branch.facts})
    return {name: torch.tensor([row.branch.facts.get(name, math.nan) for row in rows]) for name in names}
