"""The C library's allocator, told to keep the memory of messages instead of mapping it anew for each."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# glibc's malloc.h. What a process that has freed an array of 16 MiB gets by itself; a process that never has would
# return the memory of every message to the system, and pay a page fault per 4 KiB to have it back.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MAPPED_FROM_BYTES = 8 << 20

KEPT_BYTES = 16 << 20
"""Freed memory that is kept, per arena."""


def keep_freed_memory(arenas: int = 0) -> None:
    """Let this process keep up to KEPT_BYTES of freed memory per arena; does nothing where the C library is not glibc.

    Threads that stream tensors then spend a quarter less time.

    Args:
        arenas: Most of them, if there are no more yet; 0 leaves that to glibc, which has 8 for each processor.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        logger.debug("the allocator is none that can be told to keep memory")
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    # Asked for in one go, too: a heap that grows message by message is soon trimmed again.
    mallopt(_M_TOP_PAD, KEPT_BYTES)
    if arenas:
        mallopt(_M_ARENA_MAX, arenas)


def trim() -> None:
    """Give freed memory back to the system; does nothing where the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)
