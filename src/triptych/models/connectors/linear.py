"""One linear layer: the connector of the first LLaVA (Liu et al. 2023, arXiv 2304.08485).

`LlavaForConditionalGeneration` always has two layers, `linear_2(act(linear_1(x)))`. A single layer is held exactly as
`act = "linear"` (the identity) and `linear_2` = identity matrix, zero bias: multiplying by one and adding zeros changes
no bit, so plain transformers computes the very same numbers. While training, `linear_2` is a `FixedIdentity`: its
matrix is a buffer under the same names, so it is saved where transformers looks for it, costs no arithmetic, and cannot
be trained (two trained layers in a row would learn at another pace than one).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.core.config import Config
from triptych.models.connectors.initialise import initialise_linear


class LinearConnectorConfig(Config):
    """vision width -> language width."""

    kind: Literal["linear"] = "linear"
    """Names this connector."""
    bias: bool = True
    """Whether the layer has a bias."""

    def llava_fields(self) -> dict[str, Any]:
        """The fields of `LlavaConfig` that describe this connector."""
        return {"projector_hidden_act": "linear", "multimodal_projector_bias": self.bias}

    def initialise(self, projector: nn.Module) -> None:
        """Draw the layer of a `LlavaMultiModalProjector` anew and fix the second one to the identity."""
        first = projector.get_submodule("linear_1")
        assert isinstance(first, nn.Linear)
        initialise_linear(first)
        _fix_second(projector, first)


class FixedIdentity(nn.Module):
    """Returns its input; carries the identity matrix (and zero bias) as buffers so that checkpoints hold them."""

    def __init__(self, width: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(width, dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(width, dtype=dtype, device=device) if bias else None)

    def forward(self, features: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return features


def restore_linear(projector: nn.Module) -> None:
    """Fix `linear_2` of a loaded projector again if it is exactly the identity; otherwise leave the projector alone.

    Call it for projectors whose activation is the identity only.
    """
    first, second = projector.get_submodule("linear_1"), projector.get_submodule("linear_2")
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        return
    eye = torch.eye(second.out_features, dtype=second.weight.dtype, device=second.weight.device)
    is_identity = torch.equal(second.weight.detach(), eye)
    if is_identity and (second.bias is None or not bool(second.bias.detach().any())):
        _fix_second(projector, first)


def _fix_second(projector: nn.Module, first: nn.Linear) -> None:
    weight = first.weight
    second = FixedIdentity(first.out_features, first.bias is not None, weight.dtype, weight.device)
    projector.register_module("linear_2", second)
