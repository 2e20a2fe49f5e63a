"""In float64 the gradient of every objective is the same to 1e-12 for any split and any number of processes.

Real scorers and tuning plans: everything trained, LoRA, a frozen tower, and rows without pictures such that whole
micro-batches and a whole rank have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.invariants.exact import CASES, SPLITS, exact_case, run_alone
from tests.invariants.launch import launch
from tests.invariants.toys import relative_distance, runtime
from triptych.core.types import Progress, WindowValues

BOUND = 1e-12
Whole = dict[str, tuple[float, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def whole() -> Whole:
    """Every case in one process and one micro-batch."""
    return {name: run_alone(name, SPLITS["1x8"]) for name in CASES}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks saw."""
    folder: Path = tmp_path_factory.mktemp("exact")
    launch("tests.invariants.exact", [str(folder)])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.requirement("C-13")
@pytest.mark.parametrize("name", CASES)
def test_one_micro_batch_gives_the_gradient_by_definition(name: str, whole: Whole) -> None:
    case = exact_case(name)
    window, source = case.window(SPLITS["1x8"])
    batch = source.attach(window.batches[0])
    batch = batch if case.reference is None else case.reference.attach(batch)
    scores = case.scorer(batch)
    values = case.objective.observe(scores, batch) if "logit_scale" in case.objective.needs else None
    if values is None:
        terms = case.objective.terms(scores, batch, None)
    else:
        view = WindowValues(values, dict.fromkeys(values, 0), dict.fromkeys(values, batch.num_rows))
        terms = case.objective.window_terms(batch, view)
    weights = case.objective.weights(batch, Progress(0, 1))
    loss = sum(factor * terms[term] / weights[term] for term, factor in case.objective.coefficients.items())
    loss.backward()
    found = {key: item.grad for key, item in case.scorer.named_parameters() if item.grad is not None}
    assert whole[name][0] == pytest.approx(loss.item(), rel=1e-12)
    assert relative_distance(whole[name][1], found) < BOUND
    assert all(gradient.dtype == torch.float64 for gradient in found.values())


@pytest.mark.requirement("C-13", "F-28")
@pytest.mark.parametrize("split", ["8x1", "ragged"])
@pytest.mark.parametrize("name", CASES)
def test_splits_agree(name: str, split: str, whole: Whole) -> None:
    loss, found = run_alone(name, SPLITS[split])
    assert loss == pytest.approx(whole[name][0], rel=1e-12)
    assert relative_distance(whole[name][1], found) < BOUND


@pytest.mark.requirement("B-3", "B-5", "C-13", "F-28")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_agree_with_one(name: str, strategy: str, whole: Whole, reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["world_size"] == 2
        case = report[f"{strategy}/{name}"]
        assert case["loss"] == pytest.approx(whole[name][0], rel=1e-12)
        assert relative_distance(whole[name][1], case["gradients"]) < BOUND


@pytest.mark.parametrize("name", CASES)
def test_fsdp_shards_every_parameter_but_single_numbers(name: str, reports: list[dict[str, Any]]) -> None:
    expected = [key for key, item in exact_case(name).scorer.named_parameters() if item.numel() > 1]
    for report in reports:
        assert report[f"fsdp/{name}"]["sharded"] == expected
        assert report[f"ddp/{name}"]["sharded"] == []


@pytest.mark.requirement("F-24")
@pytest.mark.parametrize("name", [name for name in CASES if "lora" in name or "frozen" in name])
def test_only_what_is_tuned_gets_a_gradient(name: str, whole: Whole) -> None:
    trained = {key for key, item in exact_case(name).scorer.named_parameters() if item.requires_grad}
    assert whole[name][1].keys() == trained
    assert not any("vision_tower" in key or "vision_model" in key for key in trained)
    assert any("lora_" in key for key in trained) == ("lora" in name)
    assert runtime().world_size == 1
