"""Vision inputs of several pictures from those of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def join_pixels(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join along the first dimension; where others differ (pictures with fewer tiles), zeros are added behind.

    Args:
        parts: vision inputs by name, each [n, ...] and all with the same names; at least one.
    """
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    inner = [tensor.shape[1:] for tensor in tensors]
    if len(set(inner)) == 1:
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*inner, strict=True)]
    joined = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *largest)
    start = 0
    for tensor in tensors:
        place = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        joined[place] = tensor
        start += len(tensor)
    return joined
