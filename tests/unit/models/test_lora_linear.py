"""LoRA in one piece equals peft's own layer, gradients included, and steps aside where it does not apply."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from triptych.models.adapters import adapters_disabled, inject_adapter
from triptych.models.lora_linear import LoraLinear, _LoraProduct, use_lora_linear


class Two(nn.Module):
    """Two layers, so that the second's input has a gradient and the first's has none."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, bias=bias)
        self.second = nn.Linear(8, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def pair(bias: bool = True, dtype: torch.dtype = torch.float64, **options: object) -> tuple[nn.Module, nn.Module]:
    """The same model and factors through our layer and through peft's."""
    torch.manual_seed(0)
    plain = Two(bias).to(dtype)
    fast = copy.deepcopy(plain)
    for model, is_fast in ((plain, False), (fast, True)):
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], **options)  # type: ignore[arg-type]
        if is_fast:
            use_lora_linear(config)
        inject_adapter_in_model(config, model, adapter_name="a")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    assert isinstance(fast.get_submodule("first"), LoraLinear)
    assert type(plain.get_submodule("first")) is Linear
    return fast, plain


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.requirement("E-1", "E-7")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 4, 6), (1, 6)])
def test_equals_peft_with_gradients(bias: bool, shape: tuple[int, ...]) -> None:
    fast, plain = pair(bias)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(fast, x), gradients(plain, x)
    assert list(ours) == list(theirs) and len(ours) == 4
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-12, atol=1e-12)


def test_the_input_has_its_gradient() -> None:
    fast, plain = pair()
    found = []
    for model in (fast, plain):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
        model(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_numerical_gradients() -> None:
    torch.manual_seed(0)
    x, weight, bias, lora_a, lora_b = (
        torch.randn(shape, dtype=torch.float64) for shape in ((4, 6), (5, 6), (5,), (2, 6), (5, 2))
    )
    for item in (x, lora_a, lora_b):
        item.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: _LoraProduct.apply(x, weight, bias, a, b, 0.7), (x, lora_a, lora_b))


def test_under_autocast_it_is_as_near_to_float32_as_peft() -> None:
    fast, plain = pair(dtype=torch.float32)
    x = torch.randn(64, 6)
    exact = gradients(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(x), plain(x)
        assert ours.dtype is theirs.dtype is torch.bfloat16
    found = []
    for model in (fast, plain):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.float().square().sum().backward()
        found.append({name: item.grad for name, item in model.named_parameters() if item.grad is not None})
    for name, gradient in exact.items():
        ours_off, theirs_off = (float((item[name] - gradient).norm() / gradient.norm()) for item in found)
        assert ours_off < 1.2 * theirs_off + 1e-3, name


def test_float32_factors_on_half_precision_weights_stay_with_peft() -> None:
    fast, plain = pair(dtype=torch.bfloat16)
    for model in (fast, plain):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    x = torch.randn(5, 6).bfloat16()
    assert torch.equal(fast(x), plain(x))


def test_dropout_stays_with_peft() -> None:
    fast, plain = pair(lora_dropout=0.5)
    x = torch.randn(5, 6, dtype=torch.float64)
    outputs = []
    for model in (fast, plain):
        torch.manual_seed(4)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


def test_off_merged_and_two_adapters() -> None:
    fast, _ = pair()
    x = torch.randn(5, 6, dtype=torch.float64)
    base = Two(True).double()
    base.load_state_dict(
        {name.replace(".base_layer", ""): item for name, item in fast.state_dict().items() if "lora_" not in name}
    )
    adapted = fast(x)
    with adapters_disabled(fast):
        assert torch.equal(fast(x), base(x))
    for layer in (fast.get_submodule("first"), fast.get_submodule("second")):
        assert isinstance(layer, LoraLinear)
        layer.merge()
        ones = torch.ones(1, layer.in_features).double()
        assert torch.equal(layer(ones), layer.get_base_layer()(ones))
    torch.testing.assert_close(fast(x), adapted)


def test_what_a_recipe_injects_is_this_layer() -> None:
    model = Two(True)
    inject_adapter(model, "a", LoraConfig(r=2, target_modules=["first"]))
    assert isinstance(model.get_submodule("first"), LoraLinear)
