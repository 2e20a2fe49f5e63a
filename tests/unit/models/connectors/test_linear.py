"""The linear connector inside a LlavaMultiModalProjector."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from triptych.models.connectors.linear import FixedIdentity, LinearConnectorConfig, restore_linear


def projector(config: LinearConnectorConfig) -> LlavaMultiModalProjector:
    return LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=SiglipVisionConfig(hidden_size=6, num_attention_heads=2),
            text_config=LlamaConfig(hidden_size=4, num_attention_heads=2),
            vision_feature_layer=-1,
            **config.llava_fields(),
        )
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_projector_with_the_saved_weights_computes_one_linear_layer(bias: bool, dtype: torch.dtype) -> None:
    ours = projector(LinearConnectorConfig(bias=bias)).to(dtype)
    LinearConnectorConfig(bias=bias).initialise(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    plain = projector(LinearConnectorConfig(bias=bias)).to(dtype)
    plain.load_state_dict(ours.state_dict())
    features = torch.randn(2, 3, 6, dtype=dtype)
    single = torch.nn.functional.linear(features, ours.linear_1.weight, ours.linear_1.bias)
    assert torch.equal(ours(features), single)
    assert torch.equal(plain(features), single)


def test_only_the_first_layer_can_be_trained() -> None:
    ours = projector(LinearConnectorConfig())
    LinearConnectorConfig().initialise(ours)
    assert [name for name, _ in ours.named_parameters()] == ["linear_1.weight", "linear_1.bias"]
    assert torch.equal(ours.state_dict()["linear_2.weight"], torch.eye(4))
    assert not ours.state_dict()["linear_2.bias"].any()


def test_loaded_identity_is_fixed_again_and_anything_else_is_left_alone() -> None:
    loaded = projector(LinearConnectorConfig())
    with torch.no_grad():
        loaded.linear_2.weight.copy_(torch.eye(4))
        loaded.linear_2.bias.zero_()
    restore_linear(loaded)
    assert isinstance(loaded.linear_2, FixedIdentity)
    trained = projector(LinearConnectorConfig())
    with torch.no_grad():
        trained.linear_2.weight.copy_(torch.eye(4)).add_(1e-3)
    restore_linear(trained)
    assert isinstance(trained.linear_2, torch.nn.Linear)
