"""Recall over a whole source, with a scorer whose embeddings are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import contrastive, write_files
from triptych.core.types import Batch, Scores
from triptych.evaluation.retrieval import Retrieval
from triptych.stages.build import make_held_out_loader
from triptych.stages.contrastive import build_contrastive

ROWS = 24


class KnownEmbeddings(nn.Module):
    """Row r of the source gets the unit vector r as text, and as picture that of the row `shift` further on."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.training_seen: list[bool] = []

    def forward(self, batch: Batch) -> Scores:
        assert batch.pixels is not None
        self.training_seen.append(self.training)
        rows = torch.tensor([origin.line - 2 for origin in batch.origins])  # line 1 is the header
        basis = torch.eye(ROWS)
        near = 0.5 * basis[rows] + basis[(rows + self.shift) % ROWS] if self.shift else basis[rows]
        return Scores(image_embeddings=near, text_embeddings=basis[rows])


@pytest.mark.parametrize("batch", [5, 24])
def test_recall_counts_hits_among_all_rows(batch: int, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), **contrastive(write_files(tmp_path))}
    built = build_contrastive(read_recipe(write(tmp_path / "recipe.yaml", values)))
    source = make_held_out_loader(built.datasets[:1], built.encode, built.pictures, batch)
    exact = KnownEmbeddings(0)
    exact.train()
    same, other = Retrieval(exact, source, ks=(1, 30)), Retrieval(KnownEmbeddings(1), source, ks=(1, 2))
    results = same.run()
    assert results == {"recall_i2t@1": 1.0, "recall_t2i@1": 1.0}  # there are no 30 rows
    assert exact.training and not any(exact.training_seen)
    # Every picture is nearest to the caption of the next row, and its own caption comes second.
    assert other.run() == {"recall_i2t@1": 0.0, "recall_t2i@1": 0.0, "recall_i2t@2": 1.0, "recall_t2i@2": 1.0}
