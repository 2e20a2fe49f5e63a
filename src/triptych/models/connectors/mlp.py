"""Two linear layers with an activation between them: the connector of LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from triptych.core.config import Config
from triptych.models.connectors.initialise import initialise_linear


class MlpConnectorConfig(Config):
    """vision width -> language width, activation, language width -> language width."""

    kind: Literal["mlp"] = "mlp"
    """Names this connector."""
    layers: Literal[2] = 2
    """Linear layers; LlavaForConditionalGeneration holds exactly two."""
    activation: Literal["gelu", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"
    """Function between the layers, by its transformers name."""
    bias: bool = True
    """Whether both layers have a bias."""

    def llava_fields(self) -> dict[str, Any]:
        """The fields of `LlavaConfig` that describe this connector."""
        return {"projector_hidden_act": self.activation, "multimodal_projector_bias": self.bias}

    def initialise(self, projector: nn.Module) -> None:
        """Draw both layers of a `LlavaMultiModalProjector` anew."""
        for name in ("linear_1", "linear_2"):
            layer = projector.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            initialise_linear(layer)
