"""What the person at the terminal sees."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar

from triptych.core import distributed
from triptych.core.config import Config
from triptych.core.types import Progress, StepRecord


class ConsoleConfig(Config):
    """Show the progress on the terminal; plain lines where the output is not one."""

    kind: Literal["console"] = "console"
    """Selects this monitor."""
    window: int = Field(default=10, ge=1)
    """Steps that the running loss and the speeds are taken over."""


class _Step(NamedTuple):
    """What is shown of a step; fields as in `StepRecord`."""

    loss: float
    supervised_tokens: int
    tokens: int
    samples: int
    seconds: float
    data_seconds: float


class ConsoleMonitor:
    """A progress bar, or a line every `log_every` steps where there is no terminal.

    The loss shown is the mean over the last `window` steps, each step counting by its supervised tokens (by its samples
    where the objective supervises none), so that a short step does not weigh like a long one. Tokens a second are those
    of all rows, prompts and pictures too, without padding.
    """

    def __init__(self, config: ConsoleConfig, output: Path, log_every: int, console: Console | None = None) -> None:
        self._log_every = log_every
        self._recent: deque[_Step] = deque(maxlen=config.window)
        self._console = console or Console()
        self._bar: ProgressBar | None = None
        self._skipped_rows = 0
        self._skipped_steps = 0

    def on_start(self, progress: Progress) -> None:
        """Draw the bar, or say where the run starts."""
        if not distributed.is_main():
            return
        if not self._console.is_terminal:
            self._say(f"start at step {progress.step} of {progress.total or 'an endless source'}")
            return
        columns = (
            TextColumn("[bold]train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = ProgressBar(*columns, console=self._console)
        self._bar.add_task("train", total=progress.total, completed=progress.step, text="")
        self._bar.start()

    def on_step(self, record: StepRecord) -> None:
        """Update the bar, or print a line where one is due."""
        self._skipped_rows += record.skipped_rows
        self._skipped_steps += record.is_skipped
        if math.isfinite(record.loss):
            counts = (record.supervised_tokens, record.tokens, record.samples)
            self._recent.append(_Step(record.loss, *counts, record.seconds, record.data_seconds))
        if not distributed.is_main():
            return
        progress = record.progress
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=progress.step, text=self.describe(record))
        elif progress.step % self._log_every == 0 or progress.step == progress.total:
            self._say(f"step {progress.step}/{progress.total or '?'}  {self.describe(record)}")

    def on_evaluation(self, progress: Progress, results: Mapping[str, float]) -> None:
        """Print the results."""
        values = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
        self._say(f"evaluation at step {progress.step}: {values}")

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """Print where it is."""
        self._say(f"checkpoint of step {progress.step}: {path}")

    def on_end(self, progress: Progress, error: BaseException | None) -> None:
        """Take the bar away and sum up."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        state = f"stopped by {type(error).__name__}" if error else "finished"
        loss = f", loss {self.running_loss:.4f}" if self._recent else ""
        self._say(f"{state} at step {progress.step}{loss}")

    def state_dict(self) -> dict[str, Any]:
        """The recent steps and the counts."""
        steps = [list(step) for step in self._recent]
        return {"steps": steps, "skipped_rows": self._skipped_rows, "skipped_steps": self._skipped_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._recent.clear()
        self._recent.extend(_Step(*step) for step in state.get("steps", []))  # earlier versions kept other numbers
        self._skipped_rows, self._skipped_steps = state["skipped_rows"], state["skipped_steps"]

    @property
    def running_loss(self) -> float:
        """Mean loss of the recent steps, weighted by supervised tokens; NaN before the first."""
        weights = [step.supervised_tokens for step in self._recent]
        if not any(weights):
            weights = [step.samples for step in self._recent]
        total = sum(weights)
        losses = (step.loss * weight for step, weight in zip(self._recent, weights, strict=True))
        return sum(losses) / total if total else math.nan

    def describe(self, record: StepRecord) -> str:
        """The numbers of the progress line."""
        seconds = sum(step.seconds for step in self._recent) or math.inf
        samples = sum(step.samples for step in self._recent) / seconds
        tokens = sum(step.tokens for step in self._recent) / seconds
        waiting = sum(step.data_seconds for step in self._recent) / seconds
        rates = sorted(set(record.learning_rates.values()))
        lr = f"{rates[0]:.2e}" if len(rates) == 1 else f"{rates[0]:.2e}..{rates[-1]:.2e}" if rates else "-"
        parts = [f"loss {self.running_loss:.4f}", f"lr {lr}", f"{samples:.1f} samples/s", f"{tokens:.0f} tokens/s"]
        parts += [f"data {waiting:.0%}", f"{record.memory_bytes / 2**30:.1f} GiB", f"eta {self._eta(record.progress)}"]
        if self._skipped_rows:
            parts.append(f"{self._skipped_rows} rows left out")
        if self._skipped_steps:
            parts.append(f"{self._skipped_steps} steps skipped")
        return "  ".join(parts)

    def _eta(self, progress: Progress) -> str:
        if progress.total is None or not self._recent:
            return "-"
        each = sum(step.seconds for step in self._recent) / len(self._recent)
        return str(timedelta(seconds=round(each * (progress.total - progress.step))))

    def _say(self, text: str) -> None:
        if distributed.is_main():
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
