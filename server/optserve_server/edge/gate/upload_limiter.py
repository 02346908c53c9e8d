"""Lets the gradients of a few workers come in at a time, where many have one to send.

A few streams fill the wire and the processors as well as hundreds do. The hundreds would take the interpreter and the
caches from one another, and from whoever asks whether the server is healthy; so the others are not read meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from optserve._common.machine import usable_cores

PATIENCE_S = 0.02
"""One inside that has not moved for so long is slow, and is not waited for."""

MOVED_BYTES = 64 << 10
"""What it takes to have moved: messages of a few bytes, or of none, could keep the others out for ever."""


class UploadLimiter:
    """Lets in as many as may be inside, in the order in which they came.

    Args:
        limit: Of those inside; by default one for each core that may be used.
        patience_s: How long one inside may not move and still be counted.
    """

    def __init__(self, limit: int = 0, patience_s: float = PATIENCE_S) -> None:
        self._limit = limit or usable_cores()
        self._patience_s = patience_s
        # When each one inside has moved last, and the bytes that it has brought since.
        self._inside: dict[object, float] = {}
        self._brought: dict[object, int] = {}
        self._waiting: deque[tuple[object, threading.Lock]] = deque()
        self._lock = threading.Lock()
        self._queue_began = threading.Condition(self._lock)
        self._watching = False

    def enter(self, who: object) -> None:
        """Wait for a turn."""
        with self._lock:
            if not self._waiting and len(self._inside) < self._limit:
                self._let_in(who)
                return
            if not self._watching:
                threading.Thread(target=self._watch, name="upload limiter", daemon=True).start()
                self._watching = True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append((who, turn))
            if len(self._waiting) == 1:
                self._queue_began.notify()
        # Released by who lets it in.
        turn.acquire()

    def leave(self, who: object) -> None:
        """Come out, if that has not been done; nothing happens otherwise."""
        if who in self._inside:
            with self._lock:
                self._inside.pop(who, None)
                self._brought.pop(who, None)
                self._let_next_in()

    def moved(self, who: object, size: int) -> None:
        """One that may be inside has brought so many bytes that were missing."""
        if who in self._inside:
            with self._lock:
                if who not in self._inside:
                    return
                size += self._brought.get(who, 0)
                if size >= MOVED_BYTES:
                    self._inside[who], size = time.monotonic(), 0
                self._brought[who] = size

    def _let_in(self, who: object) -> None:
        self._inside[who] = time.monotonic()

    def _let_next_in(self) -> None:
        while self._waiting and len(self._inside) < self._limit:
            who, turn = self._waiting.popleft()
            self._let_in(who)
            turn.release()

    def _watch(self) -> None:
        while True:
            with self._lock:
                self._queue_began.wait(self._patience_s if self._waiting else None)
                long_ago = time.monotonic() - self._patience_s
                self._inside = {who: moved_at for who, moved_at in self._inside.items() if moved_at > long_ago}
                self._brought = {who: size for who, size in self._brought.items() if who in self._inside}
                self._let_next_in()
