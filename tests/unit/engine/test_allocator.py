"""Freed memory stays in the process, and is given back when peaks are measured; kernels do not pile up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from triptych.engine.allocator import FEW_KERNELS

SCRIPT = """
import resource, sys
import psutil, torch
from triptych.engine.allocator import keep_memory
from triptych.engine.memory import PeakMemory

kept = sys.argv[1] == "True" and keep_memory()

def faults():
    def work():
        for _ in range(5):
            torch.ones(25_000_000)  # 100 MB
    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# Now and then a small block comes to lie where a large one was, which then needs new memory.
found = min(faults() for _ in range(5))
with PeakMemory(torch.device("cpu"), 0.001) as memory:
    held = torch.ones(25_000_000)
print(kept, found, memory.added)
"""


def run(keep: bool) -> tuple[bool, int, int]:
    """Whether it is kept, pages that were faulted in, bytes added by 100 MB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(keep)], capture_output=True, text=True, check=True)
    kept, faults, added = done.stdout.split()
    return kept == "True", int(faults), int(added)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_the_same_memory_is_used_again_and_its_peak_can_still_be_measured() -> None:
    _, plain, added = run(keep=False)
    kept, again, added_when_kept = run(keep=True)
    assert kept and plain > 100_000 and again < plain / 50
    assert added_when_kept == pytest.approx(added, rel=0.05) == pytest.approx(100e6, rel=0.05)


NEW_SHAPES = """
import psutil, torch
from torch import nn

model = nn.Sequential(*[nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 96)] * 2)
process = psutil.Process()

def work(lengths):
    for length in lengths:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(length, 96)).float().sum().backward()

work(range(900, 910))
before = process.memory_info().rss
work(range(200, 400))
print(process.memory_info().rss - before)
"""


def test_batches_of_ever_new_lengths_do_not_pile_up_kernels() -> None:
    """Some processors keep little for a shape; there it must not become more."""

    def grown(settings: dict[str, str]) -> int:
        environment = {**{name: value for name, value in os.environ.items() if name not in FEW_KERNELS}, **settings}
        command = [sys.executable, "-c", NEW_SHAPES]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert grown(dict(FEW_KERNELS)) <= max(80 * 2**20, grown({}) / 2)
