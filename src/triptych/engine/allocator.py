"""Keep freed memory in the process: a training step allocates the same again and again.

glibc takes blocks above some size straight from the system and gives them back when they are freed, so that every
step faults all its memory in anew, page by page. What is won by keeping it is in docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

LARGE_PAGES: Mapping[str, str] = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Environment in which torch asks for pages of 2 MiB for large tensors on CPUs; it is read when torch is loaded."""
FEW_KERNELS: Mapping[str, str] = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Environment in which oneDNN keeps the kernels of so many shapes, not of 1,024: micro-batches differ in their number
of tokens, so that each brings new ones, of about a megabyte. A layer forward and backward needs some 30."""
ENVIRONMENT: Mapping[str, str] = {**LARGE_PAGES, **FEW_KERNELS}
"""Of processes that train, unless it is set otherwise."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of malloc.h
_LARGEST_KEPT = 1 << 30
"""Bytes; larger blocks, such as whole embedding matrices while they are loaded, are given back as ever."""
_GROWTH = 64 << 20


def keep_memory() -> bool:
    """Let the allocator keep what is freed, from now on; False where it is not glibc's.

    `malloc_trim` still gives back what is free, so that peaks can be measured.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # -1 as the threshold means that the end of the heap is never given back.
    settings = ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _GROWTH))
    return all(mallopt(name, value) == 1 for name, value in settings)
