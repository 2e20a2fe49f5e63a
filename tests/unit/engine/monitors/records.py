"""A step record with handy defaults."""

from __future__ import annotations

from typing import Any

from triptych.core.types import Progress, StepRecord


def record(step: int, loss: float = 1.0, total: int | None = 100, **changes: Any) -> StepRecord:
    """Record of a step of one second, 4 samples, 40 tokens, of them 10 supervised."""
    values: dict[str, Any] = {
        "progress": Progress(step, total, step / 10),
        "loss": loss,
        "terms": {"nll": loss},
        "metrics": {},
        "learning_rates": {"language": 1e-4},
        "gradient_norm": 1.0,
        "component_gradient_norms": {"language": 1.0},
        "samples": 4,
        "supervised_tokens": 10,
        "tokens": 40,
        "seconds": 1.0,
        "data_seconds": 0.25,
        "memory_bytes": 3 * 2**30,
    }
    return StepRecord(**{**values, **changes})
