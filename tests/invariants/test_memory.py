"""The memory of a contrastive step is that of its micro-batch, however many pairs the step compares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.requirement("B-10")
def test_4096_pairs_need_hardly_more_memory_than_512(tmp_path: Path) -> None:
    small, large = (added_memory(pairs, tmp_path) for pairs in (512, 4096))
    print(f"added peak: {small / 2**20:.0f} MiB for 512 pairs, {large / 2**20:.0f} MiB for 4,096: {large / small:.2f}")
    assert small > 20 * 2**20, "the activations of a micro-batch must show, or this measures noise"
    assert large <= 1.25 * small


def added_memory(pairs: int, folder: Path) -> int:
    """Bytes that a step adds at its peak, in a fresh process."""
    command = [sys.executable, "-m", "tests.invariants.memory", str(pairs), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    match = re.search(r"^added (\d+)$", result.stdout, re.MULTILINE)
    assert match
    return int(match[1])
