"""Runs a function over the slices of a range, on a few threads of its own.

The CPU backends use this instead of their libraries' threading: Numba's portable threading layer aborts the
process when two threads enter it, and NumPy has none. Rules are per dimension, so the split changes no bit.
"""

from __future__ import annotations

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

    def fits_one_thread(self, size: int, while_waking: int) -> bool:
        """Whether one thread is as fast as all; `while_waking` as above."""
        return size * (self.threads - 1) <= while_waking * self.threads

    def run(self, size: int, work: Callable[[int, int], None], while_waking: int) -> None:
        """Call work(start, stop) until [0, size) is covered, and return when all calls have returned."""
        if self.fits_one_thread(size, while_waking):
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
