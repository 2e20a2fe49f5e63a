"""One process of the tests of several ranks in `test_run_state.py`: a whole run and a broken-off one for each strategy,
a run that one rank is told to stop, and one with a row that only one rank reads.

Started as `python -m tests.unit.engine.resume_worker <folder>` with the environment that torchrun sets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tests.invariants.launch import end
from tests.unit.engine.toy_run import ToyScorer, ToySource, Watcher, toy_trainer
from triptych.core import distributed
from triptych.core.errors import DataError
from triptych.core.types import StepRecord, Window
from triptych.engine.parallel import unwrap


class Terminated(Watcher):
    """The second process alone gets SIGTERM after step 4."""

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if record.progress.step == 4 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class BadRow(ToySource):
    """The second process alone reads a row that cannot be used, in the third window."""

    def windows(self) -> Iterator[Window]:
        for window in super().windows():
            if window.index == 2 and distributed.rank() == 1:
                raise DataError("bad row", file="toy.jsonl", line=7)
            yield window


def stop_together(folder: Path) -> None:
    broken = toy_trainer(folder, strategy="ddp")
    broken.monitors = [*broken.monitors, Terminated()]
    try:
        broken.fit()
    except SystemExit as error:
        assert error.code == 143
    assert broken.progress.step == 4
    toy_trainer(folder, strategy="ddp").fit()


def fail_together(folder: Path) -> None:
    trainer = toy_trainer(folder, strategy="ddp", source=BadRow())
    try:
        trainer.fit()
    except DataError as error:
        assert [(item.file, item.line) for item in error.problems] == [("toy.jsonl", 7)]
    assert trainer.progress.step == 2


def main(folder: Path) -> None:
    for strategy in ("ddp", "fsdp"):
        toy_trainer(folder / strategy / "whole", strategy=strategy).fit()
        # Dropout and noise differ between ranks, so the state of each must come back to its own.
        broken = toy_trainer(folder / strategy / "broken", strategy=strategy)
        broken.monitors = [*broken.monitors, Watcher(fail_at=5)]
        with contextlib.suppress(KeyboardInterrupt):
            broken.fit()
        assert broken.progress.step == 5
        torch.rand(1 + distributed.rank())
        resumed = toy_trainer(folder / strategy / "broken", strategy=strategy, scorer=ToyScorer().train())
        is_sharded = isinstance(unwrap(resumed.scorer).head.weight, DTensor)
        assert is_sharded == (strategy == "fsdp")
        resumed.fit()
    stop_together(folder / "ddp" / "stopped")
    fail_together(folder / "ddp" / "failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end()
