"""Runs `triptych` commands in forked processes, and kills them when told: a kill costs no second start of Python.

Started as `python -m tests.recipes.command_server`. Reads one JSON object a line (`arguments`, `log`, `kill_after` in
seconds or null), answers with `status` (exit status, negative for a signal) and `seconds`. It never runs a command
itself, so each child starts as a fresh process would, but with every import done.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    seconds: float
    log: str
    """What it printed."""

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL


class CommandServer:
    """The parent of the forked commands."""

    def __init__(self) -> None:
        # On wide lines no message is wrapped.
        settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.command_server"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], log: Path, kill_after: float | None = None) -> Outcome:
        """Run `triptych arguments`, in the folder of the log; with `kill_after`, SIGKILL it after so many seconds."""
        assert self._process.stdin and self._process.stdout
        request = {"arguments": arguments, "log": str(log), "kill_after": kill_after}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the command server died"
        return Outcome(**json.loads(answer), log=log.read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve() -> None:
    """Answer requests until standard input ends."""
    import torch

    import triptych.cli
    import triptych.stages.checking
    import triptych.stages.pipeline  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    assert threading.active_count() == 1, "a process with threads must not fork"
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            _run(request)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        status = _wait(child, request["kill_after"])
        reply = {"status": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - start}
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)


def _wait(child: int, kill_after: float | None) -> int:
    """Wait for the child, whose process group is killed when the time is up."""
    if kill_after is None:
        return os.waitpid(child, 0)[1]
    deadline = time.perf_counter() + kill_after
    while time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _run(request: dict[str, Any]) -> None:
    """In the child: be the command, then leave without the parent's clean-up."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(Path(request["log"]).parent)
    status = 0
    try:
        from triptych import cli

        sys.argv = ["triptych", *request["arguments"]]
        cli.main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
