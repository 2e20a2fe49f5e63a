"""Tells whether a data file is the one a run started with, without reading large files whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

SMALL = 16 * 2**20
"""Bytes below which a file is known by its content alone, whenever it was written."""
_EDGE = 64 * 2**10


def fingerprint_file(path: Path) -> str:
    """Digest of a small file's content; of a larger one's size, time of change, and first and last 64 KiB.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        if status.st_size < SMALL:
            digest.update(stream.read())
        else:
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
            digest.update(stream.read(_EDGE))
            stream.seek(-_EDGE, 2)
            digest.update(stream.read())
    return digest.hexdigest()
