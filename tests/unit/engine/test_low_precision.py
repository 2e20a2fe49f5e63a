"""AdamW on bfloat16 weights loses nothing on average."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from triptych.engine.low_precision import LowPrecisionAdamW, round_stochastically

SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-8}


def entries(parameter: Tensor) -> list[dict[str, Any]]:
    return [{"params": [parameter], "lr": 1e-3, "weight_decay": 0.1}]


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 30, generator=generator).bfloat16() for _ in range(count)]


def start() -> Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(2)).bfloat16()


def train(rounding: Literal["stochastic", "master"], steps: int) -> tuple[nn.Parameter, LowPrecisionAdamW]:
    parameter = nn.Parameter(start())
    optimizer = LowPrecisionAdamW(entries(parameter), **SETTINGS, rounding=rounding)
    for gradient in gradients(steps):
        parameter.grad = gradient
        optimizer.step()
    return parameter, optimizer


def exact(steps: int) -> Tensor:
    """float32 weights, the same gradients, torch's own optimizer."""
    parameter = nn.Parameter(start().float())
    optimizer = torch.optim.AdamW(entries(parameter), **SETTINGS)
    for gradient in gradients(steps):
        parameter.grad = gradient.float()
        optimizer.step()
    return parameter.detach()


def test_a_master_copy_follows_float32_training() -> None:
    parameter, optimizer = train("master", 20)
    torch.testing.assert_close(optimizer.state[parameter]["master"], exact(20), rtol=1e-6, atol=1e-7)
    assert torch.equal(parameter, optimizer.state[parameter]["master"].bfloat16())


def test_stochastic_rounding_keeps_the_mean_of_small_updates() -> None:
    """Updates of a thousandth of the weights: rounding to the nearest loses most of them."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((20_000,), 2.0, dtype=torch.bfloat16))
    optimizer = LowPrecisionAdamW(
        [{"params": [weight], "lr": 1e-4, "weight_decay": 0.0}], **SETTINGS, rounding="stochastic"
    )
    plain = nn.Parameter(weight.detach().clone())
    nearest = torch.optim.AdamW([{"params": [plain], "lr": 1e-4, "weight_decay": 0.0}], **SETTINGS)
    for _ in range(30):
        weight.grad = plain.grad = torch.ones_like(weight)
        optimizer.step()
        nearest.step()
    assert float(plain.detach().float().mean()) == 2.0  # nothing has happened
    assert float(weight.detach().float().mean()) == pytest.approx(2.0 - 30 * 1e-4, abs=3e-4)


def test_rounding_goes_to_both_neighbours_in_proportion_and_keeps_what_fits() -> None:
    torch.manual_seed(0)
    step = 2.0**-7
    for fraction, sign in ((0.25, 1.0), (0.8, -1.0)):
        values = torch.full((50_000,), sign * (1.0 + fraction * step))
        rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
        assert set(rounded.tolist()) == {sign, sign * (1.0 + step)}
        assert float((rounded.abs() > 1).float().mean()) == pytest.approx(fraction, abs=0.01)
    fits = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126])
    assert torch.equal(round_stochastically(fits, torch.Generator().manual_seed(0)).float(), fits)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_a_restored_optimizer_goes_on_to_the_bit(rounding: Literal["stochastic", "master"]) -> None:
    torch.manual_seed(3)
    parameter, optimizer = train(rounding, 3)
    random, saved = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict())
    again = nn.Parameter(parameter.detach().clone())
    other = LowPrecisionAdamW(entries(again), **SETTINGS, rounding=rounding)
    other.load_state_dict(saved)
    assert all(value.dtype == torch.float32 for value in other.state[again].values())
    for item, stepping in ((parameter, optimizer), (again, other)):
        torch.set_rng_state(random)
        item.grad = gradients(4)[3]
        stepping.step()
    assert torch.equal(parameter, again)


def test_float32_weights_are_updated_as_by_torch() -> None:
    parameter = nn.Parameter(start().float())
    optimizer = LowPrecisionAdamW(entries(parameter), **SETTINGS, rounding="stochastic")
    for gradient in gradients(5):
        parameter.grad = gradient.float()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), exact(5), rtol=1e-6, atol=1e-7)


def test_ranks_with_other_random_states_round_alike() -> None:
    torch.manual_seed(1)
    one, _ = train("stochastic", 5)
    torch.manual_seed(2)
    other, _ = train("stochastic", 5)
    assert torch.equal(one, other)
    assert not torch.equal(one, train("master", 5)[0])
