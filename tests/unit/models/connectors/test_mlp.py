"""The two-layer connector."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from triptych.models.connectors import CONNECTORS
from triptych.models.connectors.mlp import MlpConnectorConfig


@pytest.mark.requirement("F-11", "F-14")
def test_both_layers_start_below_0_02_with_zero_bias_and_use_the_activation() -> None:
    torch.manual_seed(0)
    config = MlpConnectorConfig(activation="relu")
    projector = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=SiglipVisionConfig(hidden_size=96, num_attention_heads=2),
            text_config=LlamaConfig(hidden_size=128, num_attention_heads=2),
            vision_feature_layer=-1,
            **config.llava_fields(),
        )
    )
    config.initialise(projector)
    for layer in (projector.linear_1, projector.linear_2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not layer.bias.any()
    features = torch.randn(3, 96)
    hidden = torch.relu(features @ projector.linear_1.weight.T)
    assert torch.allclose(projector(features), hidden @ projector.linear_2.weight.T, atol=1e-6)


def test_depth_that_llava_cannot_hold_is_refused() -> None:
    with pytest.raises(ValidationError):
        MlpConnectorConfig.model_validate({"kind": "mlp", "layers": 3})


def test_table_names_every_kind() -> None:
    assert {kind: config().kind for kind, config in CONNECTORS.items()} == {"linear": "linear", "mlp": "mlp"}
