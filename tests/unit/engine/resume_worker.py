"""One process of the resume test in `test_run_state.py`: a whole run and a broken-off one for each strategy.

Started as `python -m tests.unit.engine.resume_worker <folder>` with the environment that torchrun sets.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tests.unit.engine.toy_run import ToyScorer, Watcher, toy_trainer
from triptych.core import distributed
from triptych.engine.parallel import unwrap


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
    resumed.runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
