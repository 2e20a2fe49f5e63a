"""How a run is optimised, saved and watched: everything the trainer is told that is not an object."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from triptych.core.config import Config
from triptych.engine.memory import check_limit
from triptych.engine.monitors import MonitorConfig
from triptych.engine.monitors.console import ConsoleConfig
from triptych.engine.monitors.health import HealthConfig
from triptych.engine.monitors.jsonl import JsonlConfig
from triptych.engine.monitors.tensorboard import TensorBoardConfig
from triptych.engine.optim import OptimizerConfig
from triptych.engine.parallel import RuntimeConfig
from triptych.engine.schedules import CosineConfig, ScheduleConfig
from triptych.engine.stopping import BestConfig


class TrainConfig(Config):
    """How a run is optimised, saved and watched."""

    seed: int = Field(default=0, ge=0)
    """Of dropout and everything else random in training; each rank adds its number."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and clipping."""
    schedule: ScheduleConfig = CosineConfig()
    """Learning rate over the run."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Precision and parallelism."""
    memory_limit: Annotated[float | str, BeforeValidator(check_limit)] = 0.7
    """What `loader.micro_batch: auto` may let a step add to the memory of the loaded model, gradients and optimizer
    state included: a share of what is available on the device when the run begins, or a size such as `6 GiB`, at most
    what is available."""
    save_every: int | None = Field(default=500, ge=1)
    """Steps between two checkpoints; null saves at the end (and the best) only."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept; the best one is kept besides."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations; null evaluates at the end only."""
    best: BestConfig | None = None
    """Metric that tells the best checkpoint, and early stopping. The model saved at the end is then the best one."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines or points of monitors that do not write every step."""
    monitors: tuple[MonitorConfig, ...] = (ConsoleConfig(), JsonlConfig(), TensorBoardConfig(), HealthConfig())
    """What watches the run."""
