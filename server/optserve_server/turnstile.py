"""Lets the gradients of a few steps come in at a time, where many streams have one to send.

A few streams fill the wire and the processors as well as hundreds do; the hundreds would only take the interpreter and
the caches from one another, and from whoever asks whether the server is healthy. The others are not read meanwhile,
which slows their clients, and their memory stays where it is.
"""

from __future__ import annotations

import os
import threading
from collections import deque

PATIENCE_S = 0.02
"""When nobody has come out for so long, those inside are slow, and are not waited for."""


class Turnstile:
    """Counts those inside; the others go in in the order in which they came.

    Args:
        limit: Of those inside; by default four for each processor.
        patience_s: How long nobody comes out before those inside are no longer counted.
    """

    def __init__(self, limit: int | None = None, patience_s: float = PATIENCE_S) -> None:
        self._limit = limit or 4 * (os.cpu_count() or 1)
        self._patience_s = patience_s
        self._inside: set[object] = set()
        # The first of those who wait is told through the condition, each other one when it becomes the first.
        self._changed = threading.Condition()
        self._waiting: deque[threading.Event] = deque()

    def enter(self, who: object) -> None:
        """Wait for a turn."""
        with self._changed:
            if not self._waiting and len(self._inside) < self._limit:
                self._inside.add(who)
                return
            first = threading.Event()
            self._waiting.append(first)
            if self._waiting[0] is first:
                first.set()
        first.wait()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._inside) < self._limit, self._patience_s):
                self._inside.clear()
            self._inside.add(who)
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()

    def leave(self, who: object) -> None:
        """Come out, if that has not been done; nothing happens otherwise."""
        if who in self._inside:
            with self._changed:
                self._inside.discard(who)
                self._changed.notify()
