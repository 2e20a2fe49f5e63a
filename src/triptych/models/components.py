"""Facts of model families: where vision, connector and language live inside a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Components:
    """Named parts of one model, as paths that `model.get_submodule` understands."""

    modules: Mapping[str, tuple[str, ...]]
    """Component (`vision`, `connector`, `language`, for dual encoders `vision`, `text`, `projection`) -> module or
    parameter paths; together they cover every parameter of the model exactly once."""
    layers: Mapping[str, tuple[str, ...]]
    """Component -> its blocks in order, the unit of layer ranges, activation checkpointing and FSDP2."""
    embeddings: str
    """Path of the input token embedding."""
    head: str | None
    """Path of the output head (may share its weight with the embedding); None without one."""
    image_token_id: int | None
    """Id of the placeholder that takes a vision feature; None for dual encoders."""
