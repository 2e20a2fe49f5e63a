"""Groups, decay, clipping and learning rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triptych.core.errors import ConfigError, ModelError, TrainingError
from triptych.core.types import ParameterGroup
from triptych.engine.low_precision import LowPrecisionAdamW
from triptych.engine.optim import (
    OptimizerConfig,
    bind_groups,
    build_optimizer,
    clip_gradients,
    decays,
    lr_factor,
    set_learning_rates,
)


class Model(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(3, 2)
        self.language = nn.ModuleDict(
            {
                "embedding": nn.Embedding(5, 2),
                "input_layernorm": nn.LayerNorm(2),
                "lora_A": nn.Linear(2, 1, bias=False),
                "head": nn.Linear(2, 5, bias=False),
            }
        )
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))


def group(name: str, model: nn.Module, prefix: str, **settings: Any) -> ParameterGroup:
    parameters = {key: item for key, item in model.named_parameters() if key.startswith(prefix)}
    return ParameterGroup(
        name, settings.pop("component", name), parameters, **{"lr": 1e-3, "weight_decay": 0.1, **settings}
    )


def groups_of(model: Model) -> list[ParameterGroup]:
    return [
        group("vision", model, "vision.", lr=1e-5),
        group("language", model, "language.", lr=2e-4, weight_decay=0.01),
        ParameterGroup(
            "heads", "heads", {"temperature": model.temperature, "logit_scale": model.logit_scale}, 5e-4, 0.1
        ),
    ]


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.requirement("F-5", "F-6")
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("language.layers.0.mlp.up_proj.weight", (4, 4), True),
        ("language.embed_tokens.weight", (4, 4), True),
        ("vision.patch_embedding.weight", (4, 3, 2, 2), True),
        ("language.layers.0.mlp.up_proj.bias", (4,), False),
        ("language.layers.0.input_layernorm.weight", (4,), False),
        ("vision.batch_norm.weight", (4, 4), False),
        ("logit_scale", (), False),
        ("logit_scale", (1,), False),
        ("language.layers.0.q_proj.lora_A.default.weight", (8, 4), False),
        ("language.layers.0.q_proj.lora_B.default.weight", (4, 8), False),
        ("language.layers.0.q_proj.lora_magnitude_vector.default.weight", (4,), False),
        ("connector.stacked.bias", (2, 4), False),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, torch.zeros(shape)) is expected


@pytest.mark.requirement("F-3", "F-4", "F-5", "F-6")
def test_component_times_decay() -> None:
    model = Model()
    optimizer = build_optimizer(groups_of(model), OptimizerConfig())
    names = {id(item): key for key, item in model.named_parameters()}
    found = {
        (entry["name"], entry["component"], entry["lr"], entry["weight_decay"]): [
            names[id(item)] for item in entry["params"]
        ]
        for entry in optimizer.param_groups
    }
    assert found == {
        ("vision", "vision", 1e-5, 0.1): ["vision.weight"],
        ("vision", "vision", 1e-5, 0.0): ["vision.bias"],
        ("language", "language", 2e-4, 0.01): ["language.embedding.weight", "language.head.weight"],
        ("language", "language", 2e-4, 0.0): [
            "language.input_layernorm.weight",
            "language.input_layernorm.bias",
            "language.lora_A.weight",
        ],
        ("heads", "heads", 5e-4, 0.0): ["temperature", "logit_scale"],
    }


@pytest.mark.requirement("F-5")
def test_decay_shrinks_what_it_should_and_nothing_else() -> None:
    # With zero gradients AdamW moves a weight by lr x decay x weight alone: 1 - 0.1 x 0.5.
    model = Model()
    before = {name: item.detach().clone() for name, item in model.named_parameters()}
    groups = [group("all", model, "", lr=0.1, weight_decay=0.5)]
    optimizer = build_optimizer(groups, OptimizerConfig())
    set_gradients(model, 0.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("vision.weight", "language.embedding.weight", "language.head.weight") else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.vision.requires_grad_(False)
    optimizer = build_optimizer(groups_of(model), OptimizerConfig())
    assert "vision" not in {entry["name"] for entry in optimizer.param_groups}
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing is trainable"):
        build_optimizer(groups_of(model), OptimizerConfig())


@pytest.mark.requirement("F-5")
def test_a_tied_parameter_counts_once() -> None:
    model = Model()
    model.language["head"].weight = model.language["embedding"].weight
    tied = dict(model.named_parameters(remove_duplicate=False))
    groups = [ParameterGroup("all", "all", tied, 0.1, 0.0)]
    (bound,) = bind_groups(model, groups)
    assert "language.head.weight" not in bound.parameters
    optimizer = build_optimizer([bound], OptimizerConfig())
    parameters = [item for entry in optimizer.param_groups for item in entry["params"]]
    assert len(parameters) == len({id(item) for item in parameters}) == len(list(model.parameters()))
    set_gradients(model, 1.0)
    count = sum(item.numel() for item in model.parameters())
    assert clip_gradients([bound], OptimizerConfig())[0] == pytest.approx(math.sqrt(count))


def test_groups_must_cover_every_trainable_parameter_once() -> None:
    model = Model()
    overlapping = [*groups_of(model), group("again", model, "vision.")]
    with pytest.raises(ModelError, match=r"vision\.weight is in the groups vision and again"):
        bind_groups(model, overlapping)
    with pytest.raises(TrainingError, match="is also"):
        build_optimizer(overlapping, OptimizerConfig())
    with pytest.raises(ModelError, match="trainable parameter temperature is in no group"):
        bind_groups(model, groups_of(model)[:2])
    wrong = ParameterGroup("wrong", "vision", {"vision.wieght": model.vision.weight}, 0.1, 0.0)
    with pytest.raises(ModelError, match=r"did you mean `vision\.weight`"):
        bind_groups(model, [wrong, *groups_of(model)])


def test_binding_takes_the_parameters_the_module_has_now() -> None:
    model = Model()
    groups = groups_of(model)
    model.vision.weight = nn.Parameter(torch.ones(2, 3))
    assert bind_groups(model, groups)[0].parameters["vision.weight"] is model.vision.weight


@pytest.mark.requirement("F-7")
def test_global_clipping_keeps_direction_and_reports_the_norm_before() -> None:
    # 3-4-5: gradients 3 and 4, norm 5, clipped to 1: 0.6 and 0.8.
    left, right = nn.Parameter(torch.tensor([0.0])), nn.Parameter(torch.tensor([0.0]))
    left.grad, right.grad = torch.tensor([3.0]), torch.tensor([4.0])
    groups = [
        ParameterGroup("a", "vision", {"left": left}, 0.1, 0.0),
        ParameterGroup("b", "language", {"right": right}, 0.1, 0.0),
    ]
    norm, components = clip_gradients(groups, OptimizerConfig())
    assert (norm, components) == (5.0, {"vision": 3.0, "language": 4.0})
    assert (float(left.grad), float(right.grad)) == pytest.approx((0.6, 0.8))
    # Below the limit nothing changes.
    assert clip_gradients(groups, OptimizerConfig(max_gradient_norm=2.0))[0] == pytest.approx(1.0)
    assert float(left.grad) == pytest.approx(0.6)
    clip_gradients(groups, OptimizerConfig(max_gradient_norm=None))
    assert float(left.grad) == pytest.approx(0.6)


@pytest.mark.requirement("F-8")
def test_component_clipping_scales_a_component_as_one() -> None:
    # Vision (100, 10): norm 100.5 clipped to 0.5, direction kept; clipping tensor by tensor would give (0.5, 0.5).
    large, small, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    large.grad, small.grad, other.grad = torch.tensor([100.0]), torch.tensor([10.0]), torch.tensor([0.3])
    groups = [
        ParameterGroup("vision.a", "vision", {"large": large}, 0.1, 0.0),
        ParameterGroup("vision.b", "vision", {"small": small}, 0.1, 0.0),
        ParameterGroup("language", "language", {"other": other}, 0.1, 0.0),
    ]
    config = OptimizerConfig(max_gradient_norm=1.0, max_component_norms={"vision": 0.5})
    norm, components = clip_gradients(groups, config)
    vision = math.hypot(100, 10)
    assert components == pytest.approx({"vision": vision, "language": 0.3})
    assert norm == pytest.approx(math.hypot(vision, 0.3))
    assert float(large.grad / small.grad) == pytest.approx(10.0)
    assert math.hypot(float(large.grad), float(small.grad)) == pytest.approx(0.5)
    assert float(other.grad) == pytest.approx(0.3), "the clipped whole, 0.58, is below its limit"


@pytest.mark.requirement("F-7")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_reported_and_left_alone(value: float) -> None:
    model = Model()
    set_gradients(model, 5.0)
    assert model.vision.bias.grad is not None and model.temperature.grad is not None
    model.vision.bias.grad[0] = value
    norm, components = clip_gradients(groups_of(model), OptimizerConfig())
    assert not math.isfinite(norm)
    assert not math.isfinite(components["vision"]) and math.isfinite(components["language"])
    assert float(model.temperature.grad) == 5.0


def test_an_unknown_component_to_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no component `visoin` to clip\n.*did you mean `vision`"):
        build_optimizer(groups_of(Model()), OptimizerConfig(max_component_norms={"visoin": 0.5}))


@pytest.mark.requirement("F-3")
def test_learning_rates_follow_the_multiplier() -> None:
    optimizer = build_optimizer(groups_of(Model()), OptimizerConfig())
    assert set_learning_rates(optimizer, 0.5) == {"vision": 5e-6, "language": 1e-4, "heads": 2.5e-4}
    assert set_learning_rates(optimizer, 1.0)["vision"] == 1e-5
    assert {entry["lr"] for entry in optimizer.param_groups} == {1e-5, 2e-4, 5e-4}


@pytest.mark.requirement("F-29")
def test_learning_rates_grow_with_the_global_batch() -> None:
    # Batch 32 where the rates were chosen for 8: 4 times (linear) or twice (square root).
    assert lr_factor(OptimizerConfig(lr_scaling="linear", base_batch=8), 32) == 4.0
    config = OptimizerConfig(lr_scaling="sqrt", base_batch=8)
    assert lr_factor(config, 32) == 2.0
    assert lr_factor(OptimizerConfig(), None) == 1.0
    optimizer = build_optimizer(groups_of(Model()), config, global_batch=32)
    assert set_learning_rates(optimizer, 1.0)["vision"] == pytest.approx(2e-5)
    with pytest.raises(ConfigError, match="needs base_batch"):
        build_optimizer(groups_of(Model()), config)
    with pytest.raises(ConfigError, match="needs base_batch"):
        lr_factor(OptimizerConfig(lr_scaling="sqrt"), 32)


def test_the_fused_step_equals_the_plain_one() -> None:
    def train(fused: bool) -> Tensor:
        torch.manual_seed(0)
        model = Model().double()
        optimizer = build_optimizer(groups_of(model), OptimizerConfig(eps=1e-6, betas=(0.8, 0.95)))
        for entry in optimizer.param_groups:
            entry["fused"] = fused
        for step in range(3):
            set_gradients(model, 0.1 * (step + 1))
            optimizer.step()
        return torch.cat([item.detach().reshape(-1) for item in model.parameters()])

    assert torch.allclose(train(True), train(False), rtol=1e-12, atol=0)


def test_bfloat16_weights_get_the_optimizer_that_was_asked_for() -> None:
    model = Model().bfloat16()
    assert type(build_optimizer(groups_of(model), OptimizerConfig())) is torch.optim.AdamW
    optimizer = build_optimizer(groups_of(model), OptimizerConfig(bf16_weights="master", betas=(0.8, 0.9)))
    assert isinstance(optimizer, LowPrecisionAdamW) and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(ConfigError, match="`stochastic`, but no weight that is trained is bfloat16"):
        build_optimizer(groups_of(Model()), OptimizerConfig(bf16_weights="stochastic"))
