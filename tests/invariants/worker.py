"""One process of `test_world_size.py`: runs every case in one gloo group and writes what it saw.

Started as `python -m tests.invariants.worker <folder>` with the environment that torchrun sets.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.invariants.launch import end
from tests.invariants.real import UNUSED, real_case
from tests.invariants.toys import OBJECTIVES, ToyReference, ToyScorer, ToySource, runtime, toy_batch, toy_groups
from triptych.core import distributed
from triptych.core.errors import TrainingError
from triptych.core.types import Batch, ParameterGroup, Progress, Window
from triptych.engine.optim import OptimizerConfig, bind_groups, build_optimizer, clip_gradients, set_learning_rates
from triptych.engine.parallel import unwrap
from triptych.engine.step import run_window

BLOCKS = ("blocks.0", "blocks.1")
CLIPPING = OptimizerConfig(max_gradient_norm=0.05, max_component_norms={"vision": 0.01})
REAL = ("llava/language", "llava/dpo", "siglip/siglip", "clip/clip")
LAYOUTS: dict[str, tuple[tuple[tuple[int, ...], ...], ...]] = {
    "one_each": (((0, 1, 2, 3),), ((4, 5, 6, 7),)),
    "uneven": (((0, 1, 2), (3,), (4, 5)), ((6, 7),)),
    "rank_without_samples": (((0, 1, 2, 3, 4), (5, 6, 7)), ()),
}
"""Layout -> rank -> micro-batch -> examples; together always the examples 0 to 7."""


def rank_window(layout: str, rank: int) -> Window:
    """A rank without samples holds one padding batch."""
    batches: tuple[Batch, ...] = tuple(toy_batch(examples) for examples in LAYOUTS[layout][rank])
    return Window(0, 0.0, batches or (toy_batch((0,), is_padding=True),))


def run_case(strategy: str, name: str, layout: str) -> dict[str, Any]:
    """One window and one optimizer step; tensors are whole."""
    torch.manual_seed(0)
    # Ranks start from different weights: wrapping must make them those of rank 0.
    engine = runtime(strategy=strategy, activation_checkpointing=strategy == "fsdp")
    scorer = ToyScorer(seed=distributed.rank())
    groups = toy_groups(scorer)
    module = engine.wrap(scorer, BLOCKS)
    groups = bind_groups(module, groups)
    optimizer = build_optimizer(groups, CLIPPING)
    window = rank_window(layout, distributed.rank())
    result = run_window(module, OBJECTIVES[name], window, ToySource(), ToyReference(), engine, Progress(0, 1))
    found = whole({key: item.grad for key, item in unwrap(module).named_parameters()})
    norm, component_norms = clip_gradients(groups, CLIPPING)
    case = {
        "sharded": [key for key, item in unwrap(module).named_parameters() if isinstance(item, DTensor)],
        "gradients": found,
        "result": asdict(result),
        "norm": norm,
        "component_norms": component_norms,
    }
    case["clipped"] = whole({key: item.grad for key, item in unwrap(module).named_parameters()})
    set_learning_rates(optimizer, 0.5)
    case["is_skipped"] = engine.step(optimizer)
    case["parameters"] = whole(dict(unwrap(module).named_parameters()))
    return case


def whole(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Full copies; every rank must call it."""
    result = {}
    for name, tensor in tensors.items():
        assert tensor is not None, name
        tensor = tensor.detach()
        result[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
    return result


def train(strategy: str, name: str, windows: list[Window]) -> dict[str, Tensor]:
    """Parameters after a step for each window, as the trainer takes them."""
    engine, scorer = runtime(strategy=strategy), ToyScorer()
    groups = toy_groups(scorer)
    module = engine.wrap(scorer, BLOCKS)
    groups = bind_groups(module, groups)
    optimizer = build_optimizer(groups, CLIPPING)
    for window in windows:
        run_window(module, OBJECTIVES[name], window, ToySource(), ToyReference(), engine, Progress(0, 1))
        clip_gradients(groups, CLIPPING)
        engine.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    return whole(dict(unwrap(module).named_parameters()))


def rank_windows(rank: int) -> list[Window]:
    """Three windows of the examples 0 to 23, split differently on each rank."""
    return [
        Window(index, 0.0, tuple(toy_batch([8 * index + item for item in part]) for part in LAYOUTS["uneven"][rank]))
        for index in range(3)
    ]


def run_real(strategy: str, name: str) -> dict[str, Any]:
    """One window of a real architecture, unevenly split; activations are recomputed under FSDP2."""
    engine = runtime(strategy=strategy, activation_checkpointing=strategy == "fsdp")
    case = real_case(name)
    window, source = case.window(LAYOUTS["uneven"][distributed.rank()])
    module = engine.wrap(case.scorer, case.blocks)
    result = run_window(module, case.objective, window, source, case.reference, engine, Progress(0, 1))
    found = {key: item.grad for key, item in unwrap(module).named_parameters() if item.grad is not None}
    return {"loss": result.loss, "gradients": whole(found)}


def run_unreached(strategy: str) -> str:
    """A trainable parameter that no score depends on."""
    engine, case = runtime(strategy=strategy), real_case("llava/language")
    case.scorer.get_submodule(UNUSED).requires_grad_(True)
    window, source = case.window(((distributed.rank(),),))
    module = engine.wrap(case.scorer, case.blocks)
    try:
        run_window(module, case.objective, window, source, None, engine, Progress(0, 1))
    except TrainingError as error:
        return str(error)
    return ""


class Scaled(nn.Module):
    """A layer and a temperature, which FSDP2 leaves whole: both kinds of gradient are unscaled together."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) * self.temperature


def run_overflow(strategy: str) -> dict[str, Any]:
    """fp16: an infinity in one rank's shard, or in a 0-d gradient, makes every rank skip that step and no other."""
    engine = runtime(strategy=strategy, precision="fp16")
    module = engine.wrap(Scaled(), ("linear",))
    groups = [ParameterGroup("all", "all", dict(unwrap(module).named_parameters()), lr=0.1, weight_decay=0.0)]
    optimizer = build_optimizer(groups, OptimizerConfig())
    assert engine.scaler is not None
    before = whole(dict(unwrap(module).named_parameters()))
    outcomes = []
    for poisoned in ("linear.weight", "temperature", ""):
        optimizer.zero_grad()
        with engine.autocast():
            loss = module(torch.ones(2, 4)).float().mean()
        engine.backward(loss)
        engine.finish_gradients(module)
        gradient = unwrap(module).get_parameter(poisoned or "linear.bias").grad
        assert gradient is not None
        if poisoned and (distributed.rank() == 1 or not isinstance(gradient, DTensor)):
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.fill_(float("inf"))
        engine.unscale(optimizer)
        outcomes.append(engine.step(optimizer))
    assert float(unwrap(module).get_parameter("temperature").grad) < 10, "unscaled"
    after = whole(dict(unwrap(module).named_parameters()))
    return {"skipped": outcomes, "moved": not torch.equal(before["linear.weight"], after["linear.weight"])}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        for name in OBJECTIVES:
            for layout in LAYOUTS:
                report[f"{strategy}/{name}/{layout}"] = run_case(strategy, name, layout)
        for name in REAL:
            report[f"{strategy}/{name}"] = run_real(strategy, name)
        for name in OBJECTIVES:
            report[f"{strategy}/{name}/trained"] = train(strategy, name, rank_windows(distributed.rank()))
        report[f"{strategy}/unreached"] = run_unreached(strategy)
        report[f"{strategy}/overflow"] = run_overflow(strategy)
    report["world_size"] = distributed.world_size()
    torch.save(report, folder / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end()
