"""Runs a function over the slices of a range, on a few threads of its own.

The CPU backends use this instead of their libraries' threading: Numba's portable threading layer aborts the
process when two threads enter it, and NumPy has none. Rules are per dimension, so the split changes no bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from optserve._common.machine import usable_cores

FORMULA, KERNEL, PASS = 1 << 16, 3 << 17, 1 << 20
"""Elements that one thread works off while others wake up, about 0.2 ms in a virtual machine: those of a rule's formula
in NumPy, of a compiled kernel, and of a pass that only copies or looks."""


class Slices:
    """Splits [0, size) evenly over `threads` threads, of which the caller is one; 0 for one per usable core."""

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads or usable_cores()
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="kernel")

    def alone_to(self, while_waking: int) -> int:
        """The most elements that one thread works off as fast as all; `while_waking` is one of the numbers above."""
        return while_waking * self.threads // (self.threads - 1) if self.threads > 1 else sys.maxsize

    def run(self, size: int, work: Callable[[int, int], None], alone_to: int) -> None:
        """Call work(start, stop) until [0, size) is covered, and return when all calls have returned."""
        if size <= alone_to:
            work(0, size)
            return
        # Multiples of 16 elements keep neighbouring threads off each other's cache lines.
        share = (-(-size // self.threads) + 15) // 16 * 16
        others = [self._pool.submit(work, start, min(start + share, size)) for start in range(share, size, share)]
        try:
            work(0, min(share, size))
        finally:
            for other in others:
                other.result()
