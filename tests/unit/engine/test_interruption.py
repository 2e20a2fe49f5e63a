"""Signals as a wish: noted, answered at once the second time, and handlers put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from triptych.engine.interruption import Interruption, stop_error

CPU = torch.device("cpu")


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_noted_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interruption = Interruption()
    for number in (signal.SIGINT, signal.SIGTERM):
        with interruption:
            assert interruption.received(CPU) == 0
            send(number)
            send(signal.SIGTERM)  # a launcher may pass one on that was sent to all
            assert interruption.received(CPU) == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_another_signal_is_raised_at_once(first: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), Interruption():
        send(first)
        send(signal.SIGINT)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGINT)
            assert interruption.received(CPU) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), list[object]()

    def enter() -> None:
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_what_a_stopped_run_ends_with() -> None:
    assert isinstance(stop_error(signal.SIGINT), KeyboardInterrupt)
    error = stop_error(signal.SIGTERM)
    assert isinstance(error, SystemExit) and error.code == 143
