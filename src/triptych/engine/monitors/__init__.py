"""Monitors watch a run: one file each. To add one, write the file and add it to the table and the union below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from triptych.core.protocols import Monitor
from triptych.engine.monitors.console import ConsoleConfig, ConsoleMonitor
from triptych.engine.monitors.health import HealthConfig, HealthMonitor
from triptych.engine.monitors.jsonl import JsonlConfig, JsonlMonitor
from triptych.engine.monitors.tensorboard import TensorBoardConfig, TensorBoardMonitor

MONITORS: dict[str, Callable[[Any, Path, int], Monitor]] = {
    "console": ConsoleMonitor,
    "jsonl": JsonlMonitor,
    "tensorboard": TensorBoardMonitor,
    "health": HealthMonitor,
}
"""`kind` of the configuration -> class, built with (config, output folder, log_every)."""

MonitorConfig = Annotated[ConsoleConfig | JsonlConfig | TensorBoardConfig | HealthConfig, Field(discriminator="kind")]


def build_monitors(configs: Sequence[MonitorConfig], output: Path, log_every: int) -> list[Monitor]:
    """Build the monitors of a run, in order.

    Args:
        configs: One for each monitor.
        output: Folder of the run, where those that write files put them.
        log_every: Steps between two lines or points of those that do not write every step.
    """
    return [MONITORS[config.kind](config, output, log_every) for config in configs]
