"""Pictures prepared one by one and joined."""

from __future__ import annotations

import torch

from triptych.core.pixels import join_pixels


def test_pictures_are_joined_in_order() -> None:
    first, second = {"pixel_values": torch.ones(1, 3)}, {"pixel_values": torch.full((2, 3), 2.0)}
    assert join_pixels([first, second])["pixel_values"].tolist() == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]


def test_smaller_ones_are_padded_with_zeros_and_keep_their_type() -> None:
    first, second = {"mask": torch.ones(1, 1, 2, dtype=torch.int64)}, {"mask": torch.ones(1, 2, 1, dtype=torch.int64)}
    joined = join_pixels([first, second])["mask"]
    assert joined.dtype == torch.int64
    assert joined.tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
