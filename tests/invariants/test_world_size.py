"""One process equals two gloo processes with DDP and with FSDP2: gradients, norms, clipping, the step, the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariants.launch import launch
from tests.invariants.real import UNUSED, real_case
from tests.invariants.toys import (
    OBJECTIVES,
    ToyReference,
    ToyScorer,
    ToySource,
    direct_gradients,
    gradients,
    relative_distance,
    runtime,
    toy_groups,
    toy_window,
)
from tests.invariants.worker import CLIPPING, LAYOUTS, REAL, train
from triptych.core.types import Progress
from triptych.engine.optim import build_optimizer, clip_gradients, set_learning_rates
from triptych.engine.step import run_window

Report = Mapping[str, Any]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What each of the two ranks saw, for every case."""
    folder: Path = tmp_path_factory.mktemp("world")
    launch("tests.invariants.worker", [str(folder)])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """The same step in one process and one micro-batch."""
    cases = {}
    for name, objective in OBJECTIVES.items():
        engine, scorer = runtime(), ToyScorer()
        groups = toy_groups(scorer)
        optimizer = build_optimizer(groups, CLIPPING)
        result = run_window(scorer, objective, toy_window((8,)), ToySource(), ToyReference(), engine, Progress(0, 1))
        case: dict[str, Any] = {"result": result, "gradients": gradients(scorer)}
        case["norm"], case["component_norms"] = clip_gradients(groups, CLIPPING)
        case["clipped"] = gradients(scorer)
        set_learning_rates(optimizer, 0.5)
        engine.step(optimizer)
        case["parameters"] = {key: parameter.detach().clone() for key, parameter in scorer.named_parameters()}
        cases[name] = case
    return cases


@pytest.mark.requirement("B-3", "B-5", "C-13", "F-26", "F-28")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_and_numbers_equal_one_process(
    reports: list[Report], expected: dict[str, dict[str, Any]], strategy: str, name: str, layout: str
) -> None:
    one = expected[name]
    for report in reports:
        assert report["world_size"] == 2
        case = report[f"{strategy}/{name}/{layout}"]
        assert relative_distance(one["gradients"], case["gradients"]) < 1e-12
        assert relative_distance(direct_gradients(ToyScorer(), name)[1], case["gradients"]) < 1e-12
        result = case["result"]
        assert result["loss"] == pytest.approx(one["result"].loss, rel=1e-12)
        assert result["terms"] == pytest.approx(dict(one["result"].terms), rel=1e-12)
        assert result["metrics"] == pytest.approx(dict(one["result"].metrics), rel=1e-6)
        assert (result["samples"], result["tokens"]) == (8, one["result"].tokens)


@pytest.mark.requirement("F-7", "F-8")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_clipping_and_the_step_equal_one_process(
    reports: list[Report], expected: dict[str, dict[str, Any]], strategy: str, name: str
) -> None:
    one = expected[name]
    for report in reports:
        case = report[f"{strategy}/{name}/uneven"]
        assert case["norm"] == pytest.approx(one["norm"], rel=1e-12)
        assert case["component_norms"] == pytest.approx(one["component_norms"], rel=1e-12)
        assert case["norm"] > CLIPPING.max_gradient_norm
        assert relative_distance(one["clipped"], case["clipped"]) < 1e-12
        assert relative_distance(one["parameters"], case["parameters"]) < 1e-9
        assert case["is_skipped"] is False


@pytest.mark.requirement("F-26", "F-28")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_three_steps_equal_one_process(reports: list[Report], strategy: str, name: str) -> None:
    expected = train("single", name, [toy_window((8,), first=first) for first in (0, 8, 16)])
    for report in reports:
        assert relative_distance(expected, report[f"{strategy}/{name}/trained"]) < 1e-9


def test_fsdp_really_shards(reports: list[Report]) -> None:
    # accelerate, asked for FSDP2 on CPU, runs DDP and passes every equality above.
    names = [name for name, parameter in ToyScorer().named_parameters() if parameter.ndim]
    for report in reports:
        assert report["fsdp/language/one_each"]["sharded"] == names
        assert report["ddp/language/one_each"]["sharded"] == []


@pytest.mark.requirement("I-3", "F-7")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all(reports: list[Report], strategy: str) -> None:
    for report in reports:
        assert report[f"{strategy}/overflow"] == {"skipped": [True, True, False], "moved": True}


@pytest.mark.requirement("B-3", "B-5", "C-13", "I-6")
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_real_architectures_equal_one_process(reports: list[Report], strategy: str, name: str) -> None:
    case = real_case(name)
    window, source = case.window([range(8)])
    result = run_window(case.scorer, case.objective, window, source, case.reference, runtime(), Progress(0, 1))
    expected = {key: item.grad for key, item in case.scorer.named_parameters() if item.grad is not None}
    assert len(expected) > 20
    for report in reports:
        assert report[f"{strategy}/{name}"]["loss"] == pytest.approx(result.loss, rel=1e-6)
        assert relative_distance(expected, report[f"{strategy}/{name}"]["gradients"]) < 1e-5


def test_ddp_names_a_parameter_that_takes_no_part(reports: list[Report]) -> None:
    # DDP would leave the parameters of the same bucket unaveraged and say nothing.
    for report in reports:
        assert f"{UNUSED}.weight is trainable, but no gradient reaches it" in report["ddp/unreached"]
        assert report["fsdp/unreached"] == ""
