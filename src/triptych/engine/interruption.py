"""SIGINT and SIGTERM as a wish to stop at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from triptych.core import distributed

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context that notes the first SIGINT or SIGTERM; a SIGINT after it raises KeyboardInterrupt at once.

    Outside the main thread, where Python allows no handlers, it notes nothing. A signal that was ignored stays so.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def received(self, device: torch.device) -> int:
        """Number of the signal that any rank got, 0 for none, the same on every rank. Every rank must call it.

        Args:
            device: Where the process group computes.
        """
        if not distributed.is_distributed():
            return self._received
        return int(distributed.all_reduce_max(torch.tensor(self._received, device=device)))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = self._received or number
        if number == signal.SIGINT and distributed.is_main():
            # A handler may run in the middle of a print, whose stream must not be entered again.
            os.write(2, b"\nstopping after this step; once more stops at once\n")


def stop_error(number: int) -> BaseException:
    """What a run that a signal stopped ends with: KeyboardInterrupt, or SystemExit with the status of SIGTERM."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
