"""Each way of a row in a process of its own, so that neither finds memory that the other left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from benchmarks.timing import Local, Step, Way

MODULE = "benchmarks"
COMMAND = (sys.executable, "-m", MODULE)


class Remote:
    """A process that answers each line it is written with a line of JSON, such as one that runs `serve`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], module: str = MODULE) -> None:
        """
        Args:
            arguments: of `python -m module`.
            environment: what is set beside the variables of this process.
        """
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def about(self) -> dict[str, Any]:
        """What it says of itself once it is ready.

        Raises:
            RuntimeError: it ended; with the last line it wrote.
        """
        return self._answer()

    def take(self) -> Step:
        """Take a step."""
        return Step(**self.ask("time"))

    def look_at_memory(self) -> int:
        """Take a step and look at the bytes it adds at its peak."""
        return int(self.ask("memory")["added"])

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer to a line.

        Raises:
            RuntimeError: it ended; with the last line it wrote.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which is said next
        return self._answer()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._errors.seek(0)
        written = [line.strip() for line in self._errors if line.strip()]
        last = written[-1] if written else "it wrote nothing"
        raise RuntimeError(f"exit status {self._process.wait()}: {last}")


def serve(way: Way, about: Mapping[str, Any]) -> None:
    """Take a step to warm up, say what this is, then answer each line of the standard input: `time` or `memory`."""
    runner = Local(way)
    runner.take()  # which also makes the optimizer's state; both ways do so at the same time
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        is_memory = line.strip() == "memory"
        answer = {"added": runner.look_at_memory()} if is_memory else asdict(runner.take())
        print(json.dumps(answer), flush=True)
