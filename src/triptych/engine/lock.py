"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triptych.core import distributed
from triptych.core.errors import TrainingError

logger = logging.getLogger(__name__)

NAME = ".lock"
"""File inside the output folder; it holds the process number of the main rank and stays when the run is over."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this run. Every rank must enter it; the main rank takes the lock.

    The lock belongs to the process, so that one that is killed releases it.

    Raises:
        TrainingError: another process holds it, or it cannot be written; on every rank.
    """
    descriptor: int | None = None

    def take() -> None:
        nonlocal descriptor
        descriptor = _take(folder)

    distributed.call_on_main(take)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be written, before anything large is loaded for it.

    Raises:
        TrainingError: it, or the nearest folder above it that exists, is no folder that this process may write.
    """
    try:
        existing = next(item for item in (folder, *folder.absolute().parents) if item.exists())
    except OSError as error:  # a folder on the way may not be entered
        raise _unwritable(folder, str(error.strerror)) from error
    if not existing.is_dir():
        raise _unwritable(folder, f"{existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise _unwritable(folder, f"{existing} may not be written")


def _take(folder: Path) -> int | None:
    """File descriptor that holds the lock; None on a file system without locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 100).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise TrainingError(
            f"another process ({owner}) is training into this folder",
            file=str(folder),
            key="output",
            remedy="wait for it or stop it, or choose another output folder",
        ) from None
    except OSError as error:
        os.close(descriptor)
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
        return None
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except OSError as error:  # a full disk
        os.close(descriptor)
        raise _unwritable(folder, str(error.strerror)) from error
    return descriptor


def _unwritable(folder: Path, why: str) -> TrainingError:
    return TrainingError(
        f"the output folder cannot be written: {why}",
        file=str(folder),
        key="output",
        remedy="give another `output`, or make it a folder that you may write, with room on its disk",
    )
