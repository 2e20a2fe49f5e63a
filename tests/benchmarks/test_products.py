"""Products are counted as they are computed."""

from __future__ import annotations

import torch
from benchmarks.models import TINY
from benchmarks.row import Setting
from benchmarks.rows import ROWS
from benchmarks.timing import Way

from benchmarks import products


def test_a_linear_layer_has_a_product_forward_and_two_backward() -> None:
    model = torch.nn.Linear(3, 5)
    inputs = torch.zeros(7, 3, requires_grad=True)

    def run() -> torch.Tensor:
        loss = model(inputs).sum()
        loss.backward()
        return loss

    assert products.count(Way("ours", run, model)) == 3 * 2 * 7 * 3 * 5


def test_a_tree_saves_the_trunks_of_its_other_rows() -> None:
    row = ROWS["sft_tree8_576"](Setting(scale=TINY))
    ours, peer = products.count(row.ours), products.count(row.peer)
    tokens = 8 * (577 + 28 + 32) / (577 + 8 * (28 + 32))  # what blocks compute; the head is the same
    assert 1 < peer / ours < tokens
