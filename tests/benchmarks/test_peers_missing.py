"""Where the peers are not installed, the benchmark says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_TRL = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "trl" else find(name, package)
import benchmarks
"""


def test_a_missing_peer_is_named() -> None:
    command = [sys.executable, "-c", WITHOUT_TRL]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "the benchmark needs trl -> " in done.stderr
