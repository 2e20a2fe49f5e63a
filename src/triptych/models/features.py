"""Features of frozen vision towers on disk: a picture that was seen once is never run through the tower again.

A cache is a folder of safetensors files, each written whole or not at all, so that a crash loses only what was not
written yet. Files are memory-mapped; nothing is read before it is asked for, and then compared with its checksum, once.
A picture's key is a digest of its bytes; the folder belongs to one tower with one image processor, see `tower_key`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from triptych.core.errors import ModelError

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
"""Features are written once this much has come together,"""
SHARD_SECONDS = 60.0
"""or the first of them has waited so long: what a crash loses."""
_SEPARATOR = "/"
_ABANDONED = 3600.0
"""Seconds after which a file that is not whole belongs to no process any more."""


class FeatureCache:
    """Picture key -> named tensors.

    Several processes may use one folder: each writes files of its own, and sees those of others when it opens and
    whenever it wrote one. Threads may share one object.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the folder, which is made if absent. Files that were cut off are removed, those that may not be read are
        left alone; both are said.

        Args:
            limit_bytes: nothing is added once the folder holds this much, which is said; what is there stays in use.
            shard_bytes: size of a file.
            clock: seconds.

        Raises:
            ModelError: the folder cannot be made or listed.
        """
        self._folder = folder
        self._limit = limit_bytes
        self._shard_bytes = shard_bytes
        self._clock = clock
        self._since = clock()
        self._checked: set[str] = set()
        self._said_full = False
        self._places: dict[str, tuple[Path, list[str]]] = {}
        self._open: dict[Path, Any] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._waiting_bytes = 0
        self._lock = threading.RLock()
        self._bytes = 0
        self._seen: set[Path] = set()
        self._files: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            self._look()
        except OSError as error:
            raise _refusal(folder, "used", error) from error

    @property
    def files(self) -> list[str]:
        """Names of the whole files, in order."""
        return sorted(self._files)

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self._bytes + self._waiting_bytes >= self._limit

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._places

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a picture, on the CPU, memory-mapped; None where it is not known.

        That goes for what is no longer what was written, too: its file is removed.

        Raises:
            ModelError: the file that held it is gone or cut off since it was looked at.
        """
        with self._lock:
            if key in self._waiting:
                return self._waiting[key]
            if key not in self._places:
                return None
            file, names = self._places[key]
            if file not in self._open:
                try:
                    self._open[file] = _open(file)
                except (SafetensorError, OSError) as error:
                    raise _refusal(file, "read", error) from error
            found = {name: self._open[file].get_tensor(f"{key}{_SEPARATOR}{name}") for name in names}
            if key not in self._checked:
                written = self._open[file].metadata() or {}
                if any(written.get(f"{key}{_SEPARATOR}{name}") != _checksum(value) for name, value in found.items()):
                    self._drop(file)
                    return None
                self._checked.add(key)
            return found

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember a picture; does nothing where it is known or the cache is full.

        Raises:
            ModelError: as `flush`.
        """
        with self._lock:
            if key in self:
                return
            if self.is_full:
                self._say_full()
                return
            if not self._waiting:
                self._since = self._clock()
            kept = {name: value.detach().cpu().clone() for name, value in tensors.items()}
            self._waiting[key] = kept
            self._waiting_bytes += sum(value.nbytes for value in kept.values())
            if self._waiting_bytes >= self._shard_bytes or self._clock() - self._since >= SHARD_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            ModelError: it cannot be written.
        """
        with self._lock:
            if self._waiting:
                self._write()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        """The same: a copied scorer shares it."""
        return self

    def _write(self) -> None:
        joined = {
            f"{key}{_SEPARATOR}{name}": value.contiguous()
            for key, tensors in self._waiting.items()
            for name, value in tensors.items()
        }
        file = self._folder / f"{uuid.uuid4().hex}.safetensors"
        aside = file.with_suffix(".part")
        try:
            with open(aside, "wb") as stream:
                stream.write(save(joined, {name: _checksum(value) for name, value in joined.items()}))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, file)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise _refusal(self._folder, "written", error) from error
        self._waiting, self._waiting_bytes = {}, 0
        self._look()

    def _drop(self, file: Path) -> None:
        logger.warning("%s is damaged (a checksum differs): what it held is computed again", file)
        with suppress(OSError):
            self._bytes -= file.stat().st_size
        _remove(file)
        self._open.pop(file)
        self._files.remove(file.name)
        for key in [key for key, (place, _) in self._places.items() if place == file]:
            del self._places[key]

    def _say_full(self) -> None:
        if not self._said_full:
            logger.warning(
                "%s holds %.3g GiB, which is its limit: what it does not hold is computed each time",
                self._folder,
                (self._bytes + self._waiting_bytes) / 2**30,
            )
        self._said_full = True

    def _look(self) -> None:
        """Take in files that are new in the folder; the limit holds for those of all processes together."""
        for file in sorted(set(self._folder.glob("*.safetensors")) - self._seen):
            self._seen.add(file)
            self._bytes += self._index(file)

    def _index(self, file: Path) -> int:
        try:
            with _open(file) as stored:
                names = list(stored.keys())
        except FileNotFoundError:  # another process has just found it cut off
            return 0
        except OSError as error:  # it may be whole, and of use to others
            logger.warning("%s cannot be read (%s): what it holds is computed again", file, error)
            return 0
        except SafetensorError as error:
            logger.warning("%s is damaged (%s): what it held is computed again", file, error)
            _remove(file)
            return 0
        self._files.append(file.name)
        for full in names:
            key, _, name = full.partition(_SEPARATOR)
            known = self._places.setdefault(key, (file, []))
            if known[0] == file:
                known[1].append(name)
        return file.stat().st_size


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def _remove_abandoned(folder: Path) -> None:
    for part in folder.glob("*.part"):
        with suppress(FileNotFoundError):  # it has just become whole
            if time.time() - part.stat().st_mtime > _ABANDONED:
                _remove(part)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:  # it is another user's
        logger.warning("%s cannot be removed: %s", file, error)


def _open(file: Path) -> Any:
    with open(file, "rb"):  # safetensors calls every failure "No such file"
        pass
    return safe_open(file, framework="pt")


def _refusal(path: Path, done: str, error: Exception) -> ModelError:
    remedy = "see to its disk and rights, or choose another folder; then start the run again, which goes on"
    # Not a DataError: no row is at fault, and none may be left out for it.
    return ModelError(f"what is kept in {path} cannot be {done}: {error}", remedy=remedy)


def tower_key(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Digest of all that a picture's features depend on beside the picture: weights, buffers, their types, settings.

    Args:
        state: name -> weight or buffer of the tower.
        settings: those of the image processor and of the tower's configuration, as plain values.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
