"""Lets the gradients of a few workers come in at a time, where many have one to send.

A few streams fill the wire and the processors as well as hundreds do. The hundreds would take the interpreter and the
caches from one another, and from whoever asks whether the server is healthy; so the others are not read meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque

PATIENCE_S = 0.02
"""When nobody has come out for so long, those inside are slow, and are not waited for."""


class Turnstile:
    """Lets in as many as may be inside, in the order in which they came.

    Args:
        limit: Of those inside; by default one for each processor.
        patience_s: How long nobody comes out before those inside are no longer counted.
    """

    def __init__(self, limit: int = 0, patience_s: float = PATIENCE_S) -> None:
        self._limit = limit or os.cpu_count() or 1
        self._patience_s = patience_s
        self._inside: set[object] = set()
        self._waiting: deque[tuple[object, threading.Lock]] = deque()
        self._lock = threading.Lock()
        self._queue_began = threading.Condition(self._lock)
        self._moved_at = 0.0
        self._watching = False

    def enter(self, who: object) -> None:
        """Wait for a turn."""
        with self._lock:
            if not self._waiting and len(self._inside) < self._limit:
                self._let_in(who)
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append((who, turn))
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="turnstile", daemon=True).start()
            elif len(self._waiting) == 1:
                self._queue_began.notify()
        # Released by who lets it in.
        turn.acquire()

    def leave(self, who: object) -> None:
        """Come out, if that has not been done; nothing happens otherwise."""
        if who in self._inside:
            with self._lock:
                self._inside.discard(who)
                self._let_next_in()

    def _let_in(self, who: object) -> None:
        self._inside.add(who)
        self._moved_at = time.monotonic()

    def _let_next_in(self) -> None:
        while self._waiting and len(self._inside) < self._limit:
            who, turn = self._waiting.popleft()
            self._let_in(who)
            turn.release()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._queue_began.wait()
                elif time.monotonic() - self._moved_at >= self._patience_s:
                    self._inside.clear()
                    self._let_next_in()
                else:
                    self._queue_began.wait(self._patience_s)
