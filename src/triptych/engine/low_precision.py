"""AdamW for weights held in bfloat16: updates smaller than half a step of the type would otherwise be lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

PLACES = 1_000_003
"""More than there are parameters, so that no two draws share a seed."""
_MASTER = "master"


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with float32 moments, for bfloat16 weights.

    `stochastic` rounds each new weight up or down at random, so that its mean is exact (Zamirai et al. 2020, arXiv
    2010.06192); what it draws follows from the step and the place of the parameter alone, so that replicas on several
    ranks stay equal. `master` keeps a float32 copy of every weight, which is what
    is updated; 4 bytes a weight more. Weights of other types are updated as they are.
    """

    def __init__(
        self,
        entries: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        rounding: Literal["stochastic", "master"],
    ) -> None:
        """
        Args:
            entries: groups of parameters, each with its `lr` and `weight_decay`.
            betas: decay of the running mean and of the running square of the gradient.
            eps: added to the root of the running square.
            rounding: see above.
        """
        super().__init__(list(entries), {"betas": betas, "eps": eps})
        self._keeps_master = rounding == "master"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        parameters = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for place, (parameter, group) in enumerate(parameters):
            if parameter.grad is not None:
                self._update(parameter, group, place)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state; torch's own would turn it into the type of the weights."""
        super().load_state_dict(dict(state_dict))
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    def _update(self, parameter: Tensor, group: Mapping[str, Any], place: int) -> None:
        state = self.state[parameter]
        is_low = parameter.dtype == torch.bfloat16
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if is_low and self._keeps_master:
                state[_MASTER] = parameter.float()
        weight = state.get(_MASTER, parameter.float() if is_low else parameter)
        assert parameter.grad is not None
        adamw(
            [weight],
            [parameter.grad.to(weight.dtype)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if is_low:
            if not self._keeps_master:
                seed = int(state["step"]) * PLACES + place
                weight = round_stochastically(weight, torch.Generator(parameter.device).manual_seed(seed))
            parameter.copy_(weight)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with the probability of how far the value has come from the lower neighbour.

    The 16 bits that bfloat16 lacks are a fraction; a uniform number of 16 bits is added, and what carries over stays.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
