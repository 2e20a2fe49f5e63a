"""Precision, strategy, activation checkpointing and the fp16 scaler in one process; several are in tests/invariants."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.commands import triptych
from tests.invariants.toys import (
    OBJECTIVES,
    ToyReference,
    ToyScorer,
    ToySource,
    gradients,
    relative_distance,
    runtime,
    toy_window,
)
from triptych.core.errors import ConfigError, ModelError, TrainingError
from triptych.core.types import ParameterGroup, Progress
from triptych.engine import parallel
from triptych.engine.optim import OptimizerConfig, build_optimizer, clip_gradients
from triptych.engine.parallel import (
    Runtime,
    RuntimeConfig,
    checkpointed_blocks,
    resolve_precision,
    resolve_strategy,
    unwrap,
)
from triptych.engine.step import run_window

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.mark.requirement("I-5")
@pytest.mark.parametrize(("has_bf16", "on_gpu", "on_cpu"), [(True, "bf16", "bf16"), (False, "fp16", "fp32")])
def test_auto_precision(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, on_gpu: str, on_cpu: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert resolve_precision("auto", CUDA) == on_gpu
    assert resolve_precision("auto", CPU) == on_cpu
    assert resolve_precision("fp16", CPU) == "fp16", "what is asked for is done"


@pytest.mark.requirement("I-1", "I-2", "I-3", "I-4")
def test_a_scaler_with_fp16_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.cuda.amp would warn
        engines = {precision: runtime(precision=precision) for precision in ("bf16", "fp16", "fp32")}
        with engines["bf16"].autocast(), engines["fp16"].autocast(), engines["fp32"].autocast():
            pass
    assert engines["bf16"].scaler is None and engines["fp32"].scaler is None
    scaler = engines["fp16"].scaler
    assert scaler is not None
    settings = (
        scaler.get_scale(),
        scaler.get_growth_factor(),
        scaler.get_backoff_factor(),
        scaler.get_growth_interval(),
    )
    assert settings == (2.0**16, 2.0, 0.5, 2000)


@pytest.mark.requirement("I-1", "I-4")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_products_run_in_the_precision_and_gradients_stay_fp32(precision: str, dtype: torch.dtype) -> None:
    engine, layer = runtime(precision=precision), nn.Linear(4, 4)
    with engine.autocast():
        output = layer(torch.ones(2, 4))
    assert output.dtype == dtype
    engine.backward(output.float().mean())
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


class Scorer(ToyScorer):
    """fp32 weights, as fp16 training wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.float()


@pytest.mark.requirement("I-3", "F-7")
def test_fp16_gradients_are_unscaled_before_they_are_measured() -> None:
    norms: dict[str, float] = {}
    for precision in ("fp32", "fp16"):
        engine, scorer = runtime(precision=precision), Scorer()
        group = ParameterGroup("all", "all", dict(scorer.named_parameters()), lr=1e-3, weight_decay=0.0)
        optimizer = build_optimizer([group], OptimizerConfig())
        arguments = (OBJECTIVES["language"], toy_window((3, 5)), ToySource(), None, engine, Progress(0, 1))
        assert run_window(scorer, *arguments).loss > 0
        engine.unscale(optimizer)
        norms[precision], _ = clip_gradients([group], OptimizerConfig())
        assert engine.step(optimizer) is False
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)


@pytest.mark.requirement("I-3")
def test_an_overflow_skips_the_step_halves_the_scale_and_is_saved() -> None:
    engine, layer = runtime(precision="fp16"), nn.Linear(2, 2)
    group = ParameterGroup("all", "all", dict(layer.named_parameters()), lr=1e-3, weight_decay=0.0)
    optimizer = build_optimizer([group], OptimizerConfig())
    before = layer.weight.detach().clone()
    with engine.autocast():
        loss = layer(torch.full((1, 2), 60000.0)).float().sum()
    engine.backward(loss)
    engine.unscale(optimizer)
    assert engine.step(optimizer) is True
    assert torch.equal(before, layer.weight)
    assert engine.scaler is not None and engine.scaler.get_scale() == 2.0**15
    resumed = runtime(precision="fp16")
    resumed.load_state_dict(engine.state_dict())
    assert resumed.state_dict() == engine.state_dict() and resumed.state_dict()["scale"] == 2.0**15
    assert runtime().state_dict() == {}


@pytest.mark.requirement("I-4")
def test_fp16_weights_cannot_be_trained_in_fp16() -> None:
    with pytest.raises(ModelError, match="needs trainable weights in fp32, 2 are not"):
        runtime(precision="fp16").wrap(nn.Linear(2, 2).half())
    frozen = nn.Linear(2, 2).half().requires_grad_(False)
    assert runtime(precision="fp16").wrap(frozen) is frozen


def test_strategies() -> None:
    assert resolve_strategy("auto", 1, {}) == "single"
    assert resolve_strategy("auto", 2, {}) == "ddp"
    assert resolve_strategy("fsdp", 2, {}) == "fsdp"
    assert resolve_strategy("auto", 2, {"ACCELERATE_USE_FSDP": "true"}) == "fsdp"


@pytest.mark.parametrize(
    ("strategy", "world_size", "environment", "message"),
    [
        ("ddp", 1, {}, "strategy `ddp` does not fit 1 process\n"),
        ("single", 2, {}, "strategy `single` does not fit 2 processes\n"),
        ("ddp", 2, {"ACCELERATE_USE_FSDP": "true"}, "configured for FSDP"),
        ("auto", 2, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(
    strategy: Any, world_size: int, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_strategy(strategy, world_size, environment)


def test_one_of_several_processes_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group was left, or a launcher other than torchrun gave it no rank."""
    Runtime(RuntimeConfig())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"one of 2 processes .* in no group"):
        Runtime(RuntimeConfig())


def test_the_end_of_a_process_keeps_its_status_and_words_and_leaves_pythons_end_out() -> None:
    lines = (
        "import atexit",
        "from triptych.engine.parallel import end_process",
        "atexit.register(print, 'handler')",
        "print('last words')",
        "end_process(3)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "last words\n")


def test_a_command_in_one_of_several_processes_ends_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(parallel, "end_process", ended.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert triptych("doctor").status == 1
    assert ended == [1]


@pytest.mark.requirement("I-8")
def test_checkpointed_blocks() -> None:
    assert checkpointed_blocks(False, 3) == []
    assert checkpointed_blocks(True, 3) == [0, 1, 2]
    assert checkpointed_blocks((2, 0), 3) == [0, 2]
    with pytest.raises(ConfigError, match=r"blocks \[3\] do not exist, the model has 3"):
        checkpointed_blocks((0, 3), 3)
    assert RuntimeConfig(activation_checkpointing=[1, 2]).activation_checkpointing == (1, 2)  # type: ignore[arg-type]
    assert RuntimeConfig(activation_checkpointing=True).activation_checkpointing is True


class Counting(nn.Module):
    """A block that takes keyword arguments and returns a tuple, as blocks of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, hidden: Tensor, *, scale: float) -> tuple[Tensor, None]:
        self.calls += 1
        return self.dropout(torch.tanh(self.linear(hidden))) * scale, None


class Stack(nn.Module):
    """Blocks under an input that has no gradient of its own (frozen embeddings)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Counting() for _ in range(3)])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden, _ = block(hidden, scale=0.7)
        return hidden


@pytest.mark.requirement("I-6", "I-7", "I-8")
@pytest.mark.parametrize(("choice", "calls"), [(False, [1, 1, 1]), (True, [2, 2, 2]), ((1,), [1, 2, 1])])
def test_activation_checkpointing_recomputes_the_chosen_blocks_and_changes_nothing(
    choice: Any, calls: list[int]
) -> None:
    torch.manual_seed(0)
    plain = Stack()
    stack = Stack()
    stack.load_state_dict(plain.state_dict())
    engine = runtime(activation_checkpointing=choice)
    wrapped = engine.wrap(stack, ["blocks.0", "blocks.1", "blocks.2"])
    assert unwrap(wrapped) is stack
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in plain.named_parameters()]
    inputs = torch.randn(5, 4)
    for model in (plain, stack):
        torch.manual_seed(1)
        model(inputs).sum().backward()
    assert [block.calls for block in stack.blocks] == calls
    assert relative_distance(gradients(plain), gradients(stack)) == 0.0
    with torch.no_grad():
        wrapped(inputs)


@pytest.mark.requirement("I-7")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_checkpointing_does_not_change_a_step(name: str) -> None:
    plain, recomputed = ToyScorer(), ToyScorer()
    engine = runtime(activation_checkpointing=True)
    for scorer in (plain, engine.wrap(recomputed, ["blocks.0", "blocks.1"])):
        run_window(scorer, OBJECTIVES[name], toy_window((3, 5)), ToySource(), ToyReference(), engine, Progress(0, 1))
    assert relative_distance(gradients(plain), gradients(recomputed)) < 1e-15
