"""How new linear maps start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from triptych.models.connectors.initialise import initialise_linear


@pytest.mark.requirement("F-11", "F-14")
@pytest.mark.parametrize(
    ("width", "out", "std"),
    [
        (1024, 4096, (2 / 5120) ** 0.5),  # 5120 > 5000: Xavier, 0.0198
        (1024, 1024, 0.02),  # Xavier would be 0.0313
        (768, 768, 0.02),  # Xavier would be 0.0361
    ],
)
def test_start_is_xavier_only_where_it_stays_below_0_02(width: int, out: int, std: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, out)
    initialise_linear(layer)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.01)
    assert layer.weight.std().item() < 0.0202
    assert not layer.bias.any()


@pytest.mark.requirement("F-11")
def test_layer_without_bias_is_accepted() -> None:
    layer = nn.Linear(8, 4, bias=False)
    initialise_linear(layer)
    assert layer.bias is None


@pytest.mark.requirement("F-11")
def test_wide_layer_is_uniform_within_xavier_bound() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4000, 1100)
    initialise_linear(layer)
    bound = (6 / 5100) ** 0.5
    assert 0.99 * bound < layer.weight.abs().max().item() <= bound
