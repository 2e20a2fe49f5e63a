"""Curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from triptych.core import distributed
from triptych.core.config import Config
from triptych.core.types import Progress, StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardConfig(Config):
    """Write scalars for TensorBoard."""

    kind: Literal["tensorboard"] = "tensorboard"
    """Selects this monitor."""
    folder: str = "tensorboard"
    """Name inside the output folder."""


class TensorBoardMonitor:
    """Loss, terms, metrics, learning rates, gradient norms and throughput every `log_every` steps; all evaluations."""

    def __init__(self, config: TensorBoardConfig, output: Path, log_every: int) -> None:
        self._folder = output / config.folder
        self._log_every = log_every
        self._writer: SummaryWriter | None = None

    def on_start(self, progress: Progress) -> None:
        """Open the writer; points after the resumed step are hidden by TensorBoard's own purge mark."""
        if not distributed.is_main():
            return
        # Imported here: it takes a second, which a run without TensorBoard should not pay.
        from torch.utils.tensorboard import SummaryWriter

        purge = progress.step + 1 if progress.step else None
        self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=purge)  # type: ignore[no-untyped-call]

    def on_step(self, record: StepRecord) -> None:
        """Write the step's scalars where it is due."""
        if self._writer is None or record.progress.step % self._log_every:
            return
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.progress.step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def on_evaluation(self, progress: Progress, results: Mapping[str, float]) -> None:
        """Write the results."""
        if self._writer is None:
            return
        for name, value in results.items():
            self._writer.add_scalar(f"evaluation/{name}", value, progress.step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """A checkpoint is no curve."""

    def on_end(self, progress: Progress, error: BaseException | None) -> None:
        """Close the writer."""
        if self._writer:
            self._writer.close()  # type: ignore[no-untyped-call]
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says where to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def scalars(record: StepRecord) -> dict[str, float]:
    """Tag -> value of one step; names share a prefix where they belong on one page."""
    grouped: dict[str, Mapping[str, float]] = {
        "terms": record.terms,
        "metrics": record.metrics,
        "learning_rate": record.learning_rates,
        "gradient_norm": {"all": record.gradient_norm, **record.component_gradient_norms},
    }
    values = {"loss": record.loss}
    values.update({f"{prefix}/{name}": value for prefix, group in grouped.items() for name, value in group.items()})
    if record.seconds > 0:
        values["speed/samples_per_second"] = record.samples / record.seconds
        values["speed/tokens_per_second"] = record.tokens / record.seconds
        values["speed/supervised_tokens_per_second"] = record.supervised_tokens / record.seconds
        values["speed/data_share"] = record.data_seconds / record.seconds
    values["speed/memory_bytes"] = float(record.memory_bytes)
    return values
