"""Starting a module of the tests in several processes, with the environment that torchrun sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from triptych.engine.parallel import end_process, leave

ROOT = Path(__file__).resolve().parents[2]


def end() -> NoReturn:
    """Leave the group and end, as every worker does."""
    leave()
    end_process(0)


def launch(module: str, arguments: list[str], world_size: int = 2, timeout: float = 500, status: int = 0) -> list[str]:
    """Run `python -m module arguments` on every rank.

    Args:
        timeout: seconds a rank may take.
        status: how each rank must end; else this raises with the output of those that ended otherwise.

    Returns:
        What each rank printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", module, *arguments]
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, text=True, **options))
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [
        f"rank {rank}:\n{outputs[rank]}" for rank, process in enumerate(processes) if process.returncode != status
    ]
    assert not failed, "\n".join(failed)
    return outputs
