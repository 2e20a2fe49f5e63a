"""Threads that decode: the results stay in order, and the number of threads is the fastest of those tried."""

from __future__ import annotations

import logging
import time

import pytest

from triptych.data.decoders import ROUNDS, Decoders, usable_processors


def double(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize("threads", [1, 3, "auto"])
def test_results_come_in_order(threads: int | str) -> None:
    decoders = Decoders(threads, processors=4)  # type: ignore[arg-type]
    for _ in range(12):
        assert decoders.map(double, list(range(20))) == [2 * number for number in range(20)]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 8.0, 2: 4.0, 4: 2.0, 6: 1.5}, 6),
        ({1: 8.0, 2: 4.0, 4: 3.0, 6: 5.0}, 4),
        ({1: 8.0, 2: 4.2, 4: 4.0, 6: 4.0}, 2),  # within a tenth of the fastest, and fewer
    ],
)
def test_the_fastest_number_is_taken_and_said(
    seconds: dict[int, float], chosen: int, caplog: pytest.LogCaptureFixture
) -> None:
    counts: list[int] = []
    now = [0.0]

    def clock() -> float:
        return now[0]

    decoders = Decoders("auto", processors=6, clock=clock)

    def work(number: int) -> int:
        if number == 0:  # once a batch
            tried = min(decoders.trials, key=lambda count: len(decoders.trials[count]))
            counts.append(tried)
            now[0] += seconds[tried]
        return number

    with caplog.at_level(logging.INFO, "triptych"):
        for _ in range(4 * ROUNDS):
            assert decoders.threads is None
            decoders.map(work, [0, 1])
    assert counts == [1, 2, 4, 6] * ROUNDS
    assert decoders.threads == chosen
    assert f"pictures are decoded by {chosen} threads (milliseconds a picture by threads: 1: 4000.0" in caplog.text
    assert decoders.map(double, [3]) == [6]


def test_one_slow_batch_decides_nothing() -> None:
    now = [0.0]
    decoders = Decoders("auto", processors=2, clock=lambda: now[0])
    for slow in (100.0, 1.0, 4.0, 1.0, 4.0, 1.0):  # the first batch of all, with one thread, waits for the disk
        decoders.map(lambda seconds: now.__setitem__(0, now[0] + seconds), [slow])
    assert decoders.threads == 2


def test_the_first_error_in_order_is_raised() -> None:
    def fail(number: int) -> None:
        time.sleep(0.02 * (3 - number))
        raise ValueError(str(number))

    for threads in (3, "auto"):
        with pytest.raises(ValueError, match="0"):
            Decoders(threads, processors=3).map(fail, [0, 1, 2])  # type: ignore[arg-type]


def test_processors_are_shared_with_the_other_processes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = usable_processors()
    assert alone >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert usable_processors() == 1
