"""A cache of keys and values that grows in place.

transformers' own joins all earlier keys and values with the new ones at every token, which copies the whole cache each
time. Here a layer has room ahead, new states are written behind the old ones, and what attention reads is a view.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST_ROOM = 64
"""Tokens of room that a layer makes at least when it has none."""


def growing_cache(hf: PreTrainedModel) -> DynamicCache:
    """An empty cache for `generate`; layers with a sliding window, or states of another kind, are transformers' own."""
    cache = DynamicCache(config=hf.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, [B, H, tokens, D] each. For generation only: writing in place keeps no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []
        """Tensors of which `keys` and `values` are the first tokens."""
        self._views: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states behind those that are there; returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None and self.values is not None
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        is_ours = self._views[0] is self.keys and self._views[1] is self.values
        if not is_ours or stop > self._room[0].shape[-2]:
            # No room, or somebody put other tensors in our place (repeated, cut or reordered ones).
            self._room = [_with_room(item, stop) for item in (self.keys, self.values)]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        self._views = self.keys, self.values
        return self.keys, self.values


def _with_room(states: Tensor, tokens: int) -> Tensor:
    """A larger tensor that begins with `states`."""
    batch, heads, held, size = states.shape
    room = states.new_empty(batch, heads, tokens + max(_LEAST_ROOM, tokens // 4), size)
    room[:, :, :held] = states
    return room
