"""A vision side without a model: one token for every 14 x 14 pixels, rounded down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PLACEHOLDER = "<image>"


class FakePictures:
    """Implements `PictureProcessor`."""

    def __init__(self, tokenizer: Any, size: int = 8) -> None:
        self.image_id = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        self._size = size

    @property
    def placeholder(self) -> str:
        return PLACEHOLDER

    def token_ids(self, width: int, height: int) -> list[int]:
        return [self.image_id] * ((width // 14) * (height // 14))

    def wanted_size(self, width: int, height: int) -> tuple[int, int]:
        return self._size, self._size

    def pixels(
        self, pictures: Sequence[Image.Image], sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Tensor]:
        arrays = [np.asarray(picture.resize((self._size, self._size))) for picture in pictures]
        return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255}

    def fingerprint(self) -> str:
        return f"fake-{self._size}"
