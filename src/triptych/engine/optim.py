"""Optimizer groups (component x decay), AdamW, and gradient clipping globally and by component."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from triptych.core import distributed
from triptych.core.config import Config, did_you_mean
from triptych.core.errors import ConfigError, ModelError, Problem, TrainingError
from triptych.core.types import ParameterGroup
from triptych.engine.low_precision import LowPrecisionAdamW
from triptych.engine.parallel import unwrap


class OptimizerConfig(Config):
    """AdamW and gradient clipping."""

    kind: Literal["adamw"] = "adamw"
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running square."""
    bf16_weights: Literal["nearest", "stochastic", "master"] = "nearest"
    """How the weights of a model with `dtype: bfloat16` take updates that are smaller than their type can hold.
    `nearest` loses them; `stochastic` rounds up or down at random, exact on average; `master` keeps a float32 copy of
    each (4 bytes a weight more). Gradients are bfloat16 all the same."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """L2 norm the whole gradient is clipped to; null leaves it."""
    max_component_norms: dict[str, float] = Field(default={})
    """Component (vision, connector, language, ...) -> L2 norm its own gradient is clipped to, before the whole."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the peak learning rates grow with global batch / `base_batch`; `sqrt` suits AdamW."""
    base_batch: int | None = Field(default=None, gt=0)
    """Global batch that the learning rates were chosen for; needed by `lr_scaling`."""


def bind_groups(module: nn.Module, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """The same groups, holding the parameters that `module` has under their names now (FSDP2 replaces them).

    Args:
        module: what `Runtime.wrap` returned; names are relative to the scorer inside it.
        groups: every trainable parameter in exactly one of them; a tied parameter under any one of its names.

    Raises:
        ModelError: a name does not exist, is in two groups, or a trainable parameter is in none.
    """
    current = dict(unwrap(module).named_parameters(remove_duplicate=False))
    problems: list[Problem] = []
    owners: dict[int, str] = {}
    bound: list[ParameterGroup] = []
    for group in groups:
        parameters: dict[str, nn.Parameter] = {}
        for name in group.parameters:
            parameter = current.get(name)
            if parameter is None:
                problems.append(Problem(f"group {group.name}: no parameter {name}", remedy=did_you_mean(name, current)))
            elif id(parameter) not in owners:
                owners[id(parameter)] = group.name
                parameters[name] = parameter
            elif owners[id(parameter)] != group.name:
                message = f"parameter {name} is in the groups {owners[id(parameter)]} and {group.name}"
                problems.append(Problem(message, key="tuning", remedy="give tied and shared weights to one group"))
        bound.append(replace(group, parameters=parameters))
    for name, parameter in current.items():
        if parameter.requires_grad and id(parameter) not in owners:
            owners[id(parameter)] = ""
            problems.append(Problem(f"trainable parameter {name} is in no group", key="tuning", remedy="add a rule"))
    if problems:
        raise ModelError(problems)
    return bound


def build_optimizer(
    groups: Sequence[ParameterGroup], config: OptimizerConfig, global_batch: int | None = None
) -> torch.optim.Optimizer:
    """AdamW over component x decay.

    Each entry of `param_groups` has `name` (that of its ParameterGroup), `component`, `peak_lr` and `lr`; what
    `decays` refuses is in an entry of its own without decay.

    Args:
        groups: as `bind_groups` returned them; frozen parameters are left out.
        config: the optimizer's settings.
        global_batch: samples of one optimizer step over all ranks; needed by `lr_scaling`.

    Raises:
        ConfigError: a component to clip does not exist, `lr_scaling` lacks a batch, or `bf16_weights` has no weights.
        TrainingError: nothing is trainable, or a parameter is in two groups.
    """
    _check_components(groups, config)
    factor = lr_factor(config, global_batch)
    entries: list[dict[str, Any]] = []
    seen: dict[int, str] = {}
    for group in groups:
        split: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in group.parameters.items():
            if not parameter.requires_grad:
                continue
            if id(parameter) in seen:
                raise TrainingError(
                    Problem(f"parameter {name} of group {group.name} is also {seen[id(parameter)]}", key="tuning")
                )
            seen[id(parameter)] = f"{name} of group {group.name}"
            # Fused kernels take sharded and whole tensors only apart.
            split.setdefault((decays(name, parameter), isinstance(parameter, DTensor)), []).append(parameter)
        for (has_decay, _), parameters in split.items():
            entries.append(
                {
                    "params": parameters,
                    "name": group.name,
                    "component": group.component,
                    "lr": group.lr * factor,
                    "peak_lr": group.lr * factor,
                    "weight_decay": group.weight_decay if has_decay else 0.0,
                }
            )
    if not entries:
        raise TrainingError(Problem("nothing is trainable", key="tuning", remedy="add a rule that is not `frozen`"))
    if config.bf16_weights == "nearest":
        return torch.optim.AdamW(entries, betas=config.betas, eps=config.eps, fused=True)
    if not any(parameter.dtype == torch.bfloat16 for entry in entries for parameter in entry["params"]):
        raise ConfigError(
            Problem(
                f"bf16_weights is `{config.bf16_weights}`, but no weight that is trained is bfloat16",
                key="train.optimizer.bf16_weights",
                remedy="set `dtype: bfloat16`, or leave it at `nearest`",
            )
        )
    return LowPrecisionAdamW(entries, config.betas, config.eps, config.bf16_weights)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is right for a parameter: for matrices and embeddings, not for biases, norms, scalars such
    as a temperature (0-d or one number), or LoRA factors (decay on A and B shrinks their product twice)."""
    *path, leaf = name.split(".")
    is_norm = any("norm" in part for part in path[-1:])
    return parameter.ndim >= 2 and leaf != "bias" and not is_norm and "lora_" not in name


def lr_factor(config: OptimizerConfig, global_batch: int | None) -> float:
    """Factor of every learning rate for a global batch: (batch / base_batch) to the power 1 (linear) or 1/2 (sqrt).

    Raises:
        ConfigError: scaling is asked for without `base_batch`, or the global batch is not known.
    """
    if config.lr_scaling == "none":
        return 1.0
    if config.base_batch is None or global_batch is None:
        raise ConfigError(
            Problem(
                f"lr_scaling `{config.lr_scaling}` needs base_batch ({config.base_batch}) and the global batch"
                f" ({global_batch})",
                key="train.optimizer.base_batch",
                remedy="set base_batch to the global batch your learning rates were chosen for",
            )
        )
    ratio = global_batch / config.base_batch
    return ratio if config.lr_scaling == "linear" else math.sqrt(ratio)


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Set every entry to `peak_lr * multiplier`; returns group name -> learning rate."""
    for entry in optimizer.param_groups:
        entry["lr"] = entry["peak_lr"] * multiplier
    return {entry["name"]: entry["lr"] for entry in optimizer.param_groups}


def clip_gradients(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> tuple[float, dict[str, float]]:
    """Clip gradients in place: each component to its own limit, then the whole to the global one.

    A limit scales all tensors of its unit by one factor, so that their direction is kept. Gradients must be unscaled.
    Where a norm is not finite nothing is scaled; the caller must not step.

    Returns:
        Global L2 norm and component L2 norms, all before clipping and equal on every rank.
    """
    components = _gradients(groups)
    norms = _norms(components)
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    if not math.isfinite(total):
        return total, norms
    factors = {name: _shrink(norm, config.max_component_norms.get(name)) for name, norm in norms.items()}
    clipped = math.sqrt(sum((norm * factors[name]) ** 2 for name, norm in norms.items()))
    overall = _shrink(clipped, config.max_gradient_norm)
    for name, gradients in components.items():
        factor = factors[name] * overall
        if factor < 1.0:
            for tensors in (gradients.sharded, gradients.whole):
                if tensors:
                    torch._foreach_mul_(tensors, factor)
    return total, norms


@dataclass
class _Gradients:
    """A component's gradients on this rank; writing to them writes to `.grad`."""

    sharded: list[Tensor] = field(default_factory=list)
    """Local shards."""
    whole: list[Tensor] = field(default_factory=list)
    """Tensors that every rank holds."""


def _gradients(groups: Sequence[ParameterGroup]) -> dict[str, _Gradients]:
    result: dict[str, _Gradients] = {group.component: _Gradients() for group in groups}
    for group in groups:
        for parameter in group.parameters.values():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                result[group.component].sharded.append(gradient.to_local())
            elif gradient is not None:
                result[group.component].whole.append(gradient)
    return result


def _norms(components: Mapping[str, _Gradients]) -> dict[str, float]:
    """Component -> L2 norm over all ranks, with one reduction and one transfer."""
    tensors = [tensor for item in components.values() for tensor in (*item.sharded, *item.whole)]
    device = tensors[0].device if tensors else torch.device("cpu")
    sharded = torch.stack([_square(item.sharded, device) for item in components.values()])
    whole = torch.stack([_square(item.whole, device) for item in components.values()])
    if any(item.sharded for item in components.values()):
        sharded = distributed.all_reduce_sum(sharded)
    return {name: math.sqrt(square) for name, square in zip(components, (sharded + whole).tolist(), strict=True)}


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    """0-d float64 sum of squares."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).square().sum()


def _shrink(norm: float, limit: float | None) -> float:
    return limit / norm if limit is not None and norm > limit else 1.0


def _check_components(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> None:
    known = {group.component for group in groups}
    problems = [
        Problem(
            f"no component `{name}` to clip",
            key="train.optimizer.max_component_norms",
            remedy=did_you_mean(name, known),
        )
        for name in config.max_component_norms
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
