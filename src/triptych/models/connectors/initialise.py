"""How a new linear map between two spaces is drawn."""

from __future__ import annotations

import torch
from torch import nn

XAVIER_WIDTH = 5000
"""Xavier's standard deviation sqrt(2 / (fan_in + fan_out)) is below 0.02 exactly when the fans add up to more."""


@torch.no_grad()
def initialise_linear(layer: nn.Linear) -> None:
    """Draw the weight [out, in] and set the bias, where there is one, to zero.

    Wide layers get Xavier uniform (Glorot & Bengio 2010); narrow ones N(0, 0.02^2), because Xavier would start them
    with features that drown the pre-trained token embeddings. Uses torch's global random state.
    """
    if layer.in_features + layer.out_features > XAVIER_WIDTH:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, mean=0.0, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
