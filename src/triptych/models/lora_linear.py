"""LoRA's linear layer with fewer passes over memory; equal to peft's, which computes whatever is not covered here.

peft writes y = W x + s B A x as separate operations, so that the product with B, its scaling and the sum each read and
write as many numbers as the layer has outputs, and as many again on the way back. Here the small products are added
into the large ones as they are written: y = W x, then y += s (A x) B, and the same for the input's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def use_lora_linear(config: LoraConfig) -> None:
    """Let peft build these layers where the base is a plain linear layer; quantized ones stay with peft."""
    # peft calls what it finds here like a class; a function may leave subclasses of nn.Linear to peft's own layers.
    config._register_custom_module({nn.Linear: _build})  # type: ignore[dict-item]


class LoraLinear(Linear):
    """peft's layer, computed in one piece where a single plain adapter is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + s B A x, [..., inputs] to [..., outputs] (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""
        if args or kwargs or not self._is_plain():
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        (name,) = self.active_adapters
        base = self.get_base_layer()
        weights = [base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weights = [None if item is None else item.to(dtype) for item in weights]
        if any(item is not None and item.dtype != x.dtype for item in weights):
            # such as float32 factors on half-precision weights outside autocast
            output = super().forward(x)
            return output
        weight, bias, lora_a, lora_b = weights
        return _LoraProduct.apply(x, weight, bias, lora_a, lora_b, self.scaling[name])  # type: ignore[no-any-return, no-untyped-call]

    def _is_plain(self) -> bool:
        """Whether the one adapter that is on is W + s B A and nothing else, over weights that rest."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        base = self.get_base_layer()
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and not (base._forward_hooks or base._forward_pre_hooks)
        )


def _build(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> LoraLinear | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return LoraLinear(target, adapter_name, config=config, **kwargs) if type(base) is nn.Linear else None


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            inner = rows @ lora_a.T
            output = F.linear(rows, weight, bias).addmm_(inner, lora_b.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, lora_a, lora_b)
        ctx.scale = scale  # type: ignore[attr-defined]
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, lora_a, lora_b = ctx.saved_tensors
        shape = (*gradient.shape[:-1], rows.shape[-1])
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (gradient @ lora_b).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_inner, lora_a).view(shape)
        of_a = of_inner.T @ rows
        of_b = (gradient.T @ inner).mul_(ctx.scale)
        return of_x, None, None, of_a, of_b, None
