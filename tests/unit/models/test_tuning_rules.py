"""Tuning rules as a recipe writes them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from triptych.models.tuning_rules import FrozenRule, FullRule, LoraRule, TuningRule


def lora(**fields: Any) -> LoraRule:
    return LoraRule(match="language", method="lora", **fields)


@pytest.mark.requirement("E-13")
@pytest.mark.parametrize(("rank", "alpha", "scale"), [(8, 16, 2.0), (16, 16, 1.0), (16, 32, 2.0), (64, 16, 0.25)])
def test_the_scale_is_alpha_over_rank(rank: int, alpha: int, scale: float) -> None:
    assert lora(rank=rank, alpha=alpha).scale == scale


@pytest.mark.requirement("E-13")
def test_rank_stabilised_scale_and_default_alpha() -> None:
    assert lora(rank=64, alpha=16, use_rslora=True).scale == 16 / 8
    assert lora(rank=8).effective_alpha == 16 and lora(rank=8).scale == 2.0


def test_methods_are_told_apart() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(TuningRule)
    assert adapter.validate_python({"match": "language", "method": "lora", "rank": 8}) == lora(rank=8)
    assert isinstance(adapter.validate_python({"match": "vision", "method": "frozen"}), FrozenRule)
    assert adapter.validate_python({"match": "connector", "method": "full", "lr": 1e-3}) == FullRule(
        match="connector", method="full", lr=1e-3
    )
    listed = adapter.validate_python({"match": "language", "method": "lora", "targets": ["q_proj"]})
    assert listed.targets == ("q_proj",)


@pytest.mark.parametrize(
    "bad",
    [
        {"match": "language", "method": "lora", "weight_decay": 0.1},  # LoRA is never decayed
        {"match": "vision", "method": "frozen", "lr": 1e-3},
        {"match": "language", "method": "lora", "rank": 0},
        {"match": "language", "method": "lora", "dropout": 1.0},
        {"match": "language", "method": "lora", "targets": "all"},
        {"match": "language", "method": "prefix"},
    ],
)
def test_what_a_method_does_not_have_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TuningRule).validate_python(bad)
