"""The lock of an output folder: one holder, gone with its process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.core.errors import TrainingError
from triptych.engine.lock import NAME, check_writable, locked

HOLDER = """
import sys, time
from pathlib import Path
from triptych.engine.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_one_that_is_killed_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(TrainingError, match=rf"another process \({process.pid}\)") as caught, locked(folder):
        pass
    assert caught.value.problems[0].file == str(folder)

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with locked(folder):
        assert (folder / NAME).read_text() == f"{os.getpid()}\n"
    with locked(folder):
        pass


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and "start no second run in it" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with (
        pytest.raises(TrainingError, match="cannot be written: Not a directory") as caught,
        locked(tmp_path / "taken/run"),
    ):
        pass
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (str(tmp_path / "taken" / "run"), "output")


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(TrainingError, match="cannot be written: Permission denied") as caught:
        check_writable(tmp_path / "new")
    assert (caught.value.problems[0].file, caught.value.problems[0].key) == (str(tmp_path / "new"), "output")


def test_where_nothing_may_be_written_is_known_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "new"
    check_writable(folder)
    assert not folder.parent.exists()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(TrainingError, match=f"cannot be written: {tmp_path} may not be written") as caught:
        check_writable(folder)
    assert (caught.value.problems[0].file, caught.value.problems[0].key) == (str(folder), "output")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(TrainingError, match="cannot be written: File too large"), locked(tmp_path):
            pytest.fail("the lock holds no process number")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().strip()
