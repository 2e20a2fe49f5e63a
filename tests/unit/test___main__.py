"""The package run as a module."""

from __future__ import annotations

import subprocess
import sys

from triptych import __version__


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "triptych", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
