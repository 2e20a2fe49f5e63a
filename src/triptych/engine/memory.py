"""How much memory there is, how much of it may be used, and how much a piece of work adds at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
"""Unit of a size, in small letters -> bytes."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_INTERVAL = 0.003
"""Seconds between two looks at the resident memory."""


def check_limit(limit: object) -> object:
    """Return a `memory_limit` as it is, or as a number where it is one in a text, as YAML reads `5e-1`.

    Raises:
        ValueError: it is neither a share above 0, at most 1, nor a size with a known unit.
    """
    share = limit
    if isinstance(limit, str):
        if _size(limit):
            return limit
        with contextlib.suppress(ValueError):
            share = float(limit)
    if isinstance(share, float | int) and not isinstance(share, bool) and 0 < share <= 1:
        return share
    raise ValueError(
        f"`{limit}` is neither a share of the memory, above 0 and at most 1, nor a size such as `6 GiB` "
        "(kB, MB, GB, TB, KiB, MiB, GiB, TiB)"
    )


def limit_bytes(limit: float | str, available: int) -> int:
    """A `memory_limit` in bytes.

    Args:
        limit: as `check_limit` accepts it.
        available: bytes that a share is a share of.
    """
    return _size(limit) if isinstance(limit, str) else int(limit * available)


def available_bytes(device: torch.device) -> int:
    """Bytes this process may still take: free device memory, or its part of the host's.

    On a CPU the processes of one launch share what the system and their control groups leave.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(psutil.virtual_memory().available, *group_rooms())) // processes


def group_rooms(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under the limit of each Linux control group this process is in; at least one number.

    File cache that can be dropped at once counts as free. Without groups, or without limits, the number is that of the
    whole machine.

    Args:
        groups: file that lists the groups of the process, versions 1 and 2.
        mount: folder where groups are mounted.
    """
    rooms = [psutil.virtual_memory().total]
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, files = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, files = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = top / path.lstrip("/")
        # A group's limit holds for those inside it, too. In a container the path may be that of the host; the group's
        # own files then lie at the top.
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top):
                rooms += _room(folder, *files)
    return rooms


class PeakMemory:
    """What is allocated on a device while this is entered: measured by torch on CUDA, else the resident memory of the
    process, looked at every few milliseconds. Not for use within itself."""

    def __init__(self, device: torch.device, interval: float = _INTERVAL) -> None:
        """
        Args:
            interval: seconds between two looks on a CPU.
        """
        self._device = device
        self._interval = interval
        self._process = psutil.Process()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="triptych-memory", daemon=True)
        self._before = self._peak = 0

    @property
    def added(self) -> int:
        """Bytes at the peak less those at the start."""
        return self._peak - self._before

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = self._peak = torch.cuda.memory_allocated(self._device)
            return self
        _give_back()
        self._before = self._peak = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        self._is_over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)


def gibibytes(count: float) -> str:
    """A number of bytes for people, three digits that count."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def _size(text: str) -> int:
    """Bytes of a size such as `6 GiB`; 0 where it is none."""
    match = _SIZE.fullmatch(text.strip())
    return int(float(match[1]) * UNITS.get(match[2].lower(), 0)) if match else 0


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> list[int]:
    try:
        limit, usage = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit_name, usage_name))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:  # the top group of version 2 has no such files
        return []
    cache = int(statistics.get(cache_name, 0))
    return [] if limit == "max" else [max(0, int(limit) - int(usage) + cache)]


def _give_back() -> None:
    """Let the allocator return what is free: otherwise work that fits into it adds nothing to the resident memory."""
    with contextlib.suppress(OSError, AttributeError):  # another allocator than glibc's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
