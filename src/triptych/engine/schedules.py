"""Learning rate schedules: pure functions from a step to a multiplier of the peak learning rate."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from triptych.core.config import Config
from triptych.core.errors import ConfigError, Problem


def _parse_duration(value: object) -> object:
    """Turn `3%` and fractions below 1 into a fraction, whole numbers into steps."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
        if match:
            value = float(match[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is neither steps (100), a fraction (0.03) nor a percentage (3%)")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a share of the run: write whole steps without a point, or 0 to 1")
    if value < 0:
        raise ValueError(f"{value!r} is negative")
    return value


Duration = Annotated[int | float, BeforeValidator(_parse_duration)]
"""Steps (an integer) or a share of the run (a fraction or `3%`)."""


class CosineConfig(Config):
    """Warm-up, then half a cosine down to `min_ratio` (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5)."""

    kind: Literal["cosine"] = "cosine"
    """Selects this schedule."""
    warmup: Duration = 0.03
    """Linear rise at the start."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that is left at the end, and after it."""


class LinearConfig(Config):
    """Warm-up, then a straight line down to `min_ratio`."""

    kind: Literal["linear"] = "linear"
    """Selects this schedule."""
    warmup: Duration = 0.03
    """Linear rise at the start."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that is left at the end, and after it."""


class ConstantConfig(Config):
    """Warm-up, then the peak."""

    kind: Literal["constant"] = "constant"
    """Selects this schedule."""
    warmup: Duration = 0
    """Linear rise at the start."""


class ThreePhaseConfig(Config):
    """A line from `start_ratio` to the peak, a plateau that may fall slowly, then half a cosine to `min_ratio`."""

    kind: Literal["three_phase"] = "three_phase"
    """Selects this schedule."""
    warmup: Duration = 0.05
    """Length of the first phase."""
    cooldown: Duration = 0.3
    """Length of the last phase, up to the end of the run."""
    start_ratio: float = Field(default=0.005, ge=0, le=1)
    """Share of the peak at the first step."""
    plateau_end_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the peak that is left when the last phase begins; 1 keeps it constant."""
    min_ratio: float = Field(default=0.05, ge=0, le=1)
    """Share of the peak that is left at the end, and after it."""


def _default_kind(section: Any) -> Any:
    return {"kind": "cosine", **section} if isinstance(section, dict) else section


ScheduleConfig = Annotated[
    Annotated[CosineConfig | LinearConfig | ConstantConfig | ThreePhaseConfig, Field(discriminator="kind")],
    BeforeValidator(_default_kind),
]
"""The `schedule:` section of a recipe, told apart by `kind`; cosine where it names none."""


def multiplier(config: ScheduleConfig, step: int, total: int | None) -> float:
    """Factor of the peak learning rate for the step that follows `step` finished ones.

    Args:
        config: the schedule.
        step: optimizer steps already taken, from 0.
        total: optimizer steps of the run, None for an endless source.

    Raises:
        ConfigError: the schedule needs the length of a run that has none, or its phases do not fit into it.
    """
    warmup = _steps(config.warmup, total)
    if isinstance(config, ThreePhaseConfig):
        return _three_phase(config, step, warmup, total)
    if step < warmup:
        # One more than the steps taken: the first step is not wasted on a learning rate of 0.
        return (step + 1) / (warmup + 1)
    if isinstance(config, ConstantConfig):
        return 1.0
    progress = _progress(step, warmup, _known(total))
    if isinstance(config, LinearConfig):
        return _between(1.0, config.min_ratio, progress)
    return cosine(1.0, config.min_ratio, progress)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _three_phase(config: ThreePhaseConfig, step: int, warmup: int, total: int | None) -> float:
    total = _known(total)
    fall = total - _steps(config.cooldown, total)
    if fall < warmup:
        raise ConfigError(
            Problem(
                f"warm-up ({warmup} steps) and cool-down ({total - fall}) do not fit into {total} steps",
                key="train.schedule",
                remedy="shorten `warmup` or `cooldown`, or train longer",
            )
        )
    if step < warmup:
        return _between(config.start_ratio, 1.0, step / warmup)
    if step < fall:
        return _between(1.0, config.plateau_end_ratio, _progress(step, warmup, fall))
    return cosine(config.plateau_end_ratio, config.min_ratio, _progress(step, fall, total))


def _steps(duration: int | float, total: int | None) -> int:
    return duration if isinstance(duration, int) else round(duration * _known(total))


def _progress(step: int, start: int, end: int) -> float:
    """Clamped: a cosine that runs past the end would rise again."""
    return min(1.0, (step - start) / max(1, end - start))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _known(total: int | None) -> int:
    if total is None:
        raise ConfigError(
            Problem(
                "the schedule needs the length of the run, which has none",
                key="train.schedule",
                remedy="set `loader.steps` or `loader.epochs`, or use kind constant with a warm-up in steps",
            )
        )
    return total
