"""Both ways of the loading rows make the same batches of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.loading import BATCH, LOADING, paths
from benchmarks.models import TINY
from benchmarks.row import Setting

from triptych.core.types import IGNORE, Batch


def _both(folder: Path, **options: Any) -> list[tuple[Batch, dict[str, torch.Tensor]]]:
    """Our batches, each with the peer's of the same rows."""
    ours, peer = paths(folder, 2 * BATCH, **options)
    batches = ours.batches()
    rows = [[origin.line - 1 for origin in batch.origins] for batch in batches]
    assert sorted(row for batch in rows for row in batch) == list(range(2 * BATCH))
    return list(zip(batches, map(dict, peer.batches(rows)), strict=True))


@pytest.mark.parametrize("options", [{}, {"decode_threads": 1, "prefetch": 0}])
def test_tokens_labels_and_pixels_are_those_of_trl(tmp_path: Path, options: dict[str, Any]) -> None:
    for batch, theirs in _both(tmp_path, **options):
        mask = theirs["attention_mask"]
        assert torch.equal(batch.attention_mask, mask)
        assert torch.equal(batch.input_ids * mask, theirs["input_ids"] * mask)  # what fills a row up is not read
        assert batch.pixels is not None
        order = [index for images in batch.row_images for index in images]
        assert torch.equal(batch.pixels["pixel_values"][order], theirs["pixel_values"])
        # TRL learns the prompt too (its default for messages), or with other settings the newline behind the answer:
        # what both learn must agree, and what we learn is learned there.
        learned = batch.labels != IGNORE
        assert torch.equal(batch.labels[learned], theirs["labels"][learned])
        assert (learned.sum(1) >= 10).all() and ((theirs["labels"] != IGNORE).sum(1) > learned.sum(1)).all()


def test_reduced_pictures_differ_by_at_most_two_levels_on_average(tmp_path: Path) -> None:
    for batch, theirs in _both(tmp_path, decode="draft"):
        assert torch.equal(batch.input_ids * batch.attention_mask, theirs["input_ids"] * theirs["attention_mask"])
        assert batch.pixels is not None
        order = [index for images in batch.row_images for index in images]
        levels = (batch.pixels["pixel_values"][order] - theirs["pixel_values"]).abs() * 127.5  # values: -1 to 1
        assert 0 < levels.mean() <= 2


@pytest.mark.parametrize("name", LOADING)
def test_both_ways_run(name: str) -> None:
    row = LOADING[name](Setting(scale=TINY))
    assert row.ours.run() == row.peer.run() == 1
    assert not row.compares_memory
