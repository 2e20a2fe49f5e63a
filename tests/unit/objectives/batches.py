"""Small batches for the tests of objectives: only the fields that a loss reads mean anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.core.types import IGNORE, Batch, Origin, TokenKind, WindowValues


def make_batch(
    weights: Sequence[Sequence[float | None]],
    *,
    tasks: Sequence[str] | None = None,
    pairs: Sequence[tuple[int, int]] = (),
    pair_weights: Sequence[float] | None = None,
    text_keys: Sequence[int] | None = None,
    token_values: dict[str, Tensor] | None = None,
    is_padding: bool = False,
) -> Batch:
    """One row for each list; `None` is a token that is not supervised, a number the weight of one that is."""
    num_rows, length = len(weights), max(len(row) for row in weights)
    labels = torch.full((num_rows, length), IGNORE)
    token_weights = torch.zeros(num_rows, length)
    for row, numbers in enumerate(weights):
        for column, weight in enumerate(numbers):
            if weight is not None:
                labels[row, column] = 7
                token_weights[row, column] = weight
    return Batch(
        input_ids=torch.full((num_rows, length), 7),
        labels=labels,
        weights=token_weights,
        kinds=torch.full((num_rows, length), int(TokenKind.RESPONSE), dtype=torch.uint8),
        lengths=torch.tensor([len(row) for row in weights]),
        example_index=torch.arange(num_rows),
        tree_index=torch.arange(num_rows),
        trunk_lengths=torch.ones(num_rows, dtype=torch.int64),
        images=(),
        row_images=((),) * num_rows,
        origins=tuple(Origin("rows.json", row + 1) for row in range(num_rows)),
        tasks=tuple(tasks or [""] * num_rows),
        pairs=torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2),
        pair_weights=torch.tensor(list(pair_weights) if pair_weights is not None else [1.0] * len(pairs)),
        text_keys=torch.tensor(list(text_keys) if text_keys is not None else [0] * num_rows, dtype=torch.int64),
        token_values=token_values or {},
        is_padding=is_padding,
    )


def make_pairs_batch(text_keys: Sequence[int], is_padding: bool = False) -> Batch:
    """Picture-caption rows of which only the keys matter."""
    return make_batch([[None]] * len(text_keys), text_keys=text_keys, is_padding=is_padding)


def join(observed: Sequence[dict[str, Tensor]]) -> list[WindowValues]:
    """What the engine hands each micro-batch: leaves that every micro-batch shares, and its own place in them."""
    names = observed[0].keys()
    values: dict[str, Tensor] = {}
    for name in names:
        parts = [item[name].detach() for item in observed]
        joined = parts[0].clone() if parts[0].ndim == 0 else torch.cat(parts)
        values[name] = joined.requires_grad_(joined.is_floating_point())
    windows = []
    starts = dict.fromkeys(names, 0)
    for item in observed:
        counts = {name: item[name].shape[0] if item[name].ndim else 0 for name in names}
        windows.append(WindowValues(values, dict(starts), counts))
        starts = {name: starts[name] + counts[name] for name in names}
    return windows
