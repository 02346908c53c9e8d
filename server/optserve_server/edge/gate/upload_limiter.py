"""Limits how many workers' gradients the server receives at a time.

A few streams use the network and the processors as well as hundreds do. Hundreds would compete for the interpreter and
the caches, and would delay health checks. So the server does not read the other streams meanwhile.
"""

from __future__ import annotations

from collections import deque

from optserve._common.clock import SYSTEM, Clock, Lock
from optserve._common.machine import usable_cores

SLOW_AFTER_S = 0.02
"""Seconds without progress after which an admitted stream no longer counts."""

PROGRESS_BYTES = 64 << 10
"""Fewer bytes are no progress: otherwise empty or tiny messages could keep the others out for ever."""


class UploadLimiter:
    """Admits streams in the order in which they come, at most `limit` at a time.

    Args:
        limit: Most streams at a time; by default one for each usable core.
        slow_after_s: Seconds without progress after which an admitted stream no longer counts.
        clock: The time.
    """

    def __init__(self, limit: int = 0, slow_after_s: float = SLOW_AFTER_S, clock: Clock = SYSTEM) -> None:
        self._clock, self._monotonic = clock, clock.monotonic
        self._limit = limit or usable_cores()
        self._slow_after_s = slow_after_s
        # The time of each admitted stream's last progress, and the bytes that it has received since.
        self._inside: dict[object, float] = {}
        self._brought: dict[object, int] = {}
        self._waiting: deque[tuple[object, Lock]] = deque()
        self._lock = clock.lock()
        self._queue_began = clock.condition(self._lock)
        self._watching = False

    def enter(self, stream: object) -> None:
        """Wait until the stream is admitted."""
        with self._lock:
            if not self._waiting and len(self._inside) < self._limit:
                self._admit(stream)
                return
            if not self._watching:
                self._clock.thread(self._watch, "upload limiter").start()
                self._watching = True
            admitted = self._clock.lock()
            admitted.acquire()
            self._waiting.append((stream, admitted))
            if len(self._waiting) == 1:
                self._queue_began.notify_all()
        # `_admit_next` releases it.
        admitted.acquire()

    def leave(self, stream: object) -> None:
        """Let the next stream in; does nothing if this one is not admitted."""
        if stream in self._inside:
            with self._lock:
                self._inside.pop(stream, None)
                self._brought.pop(stream, None)
                self._admit_next()

    def record_progress(self, stream: object, size: int) -> None:
        """Count bytes of a gradient that a stream has received; does nothing if it is not admitted."""
        if stream in self._inside:
            with self._lock:
                if stream not in self._inside:
                    return
                size += self._brought.get(stream, 0)
                if size >= PROGRESS_BYTES:
                    self._inside[stream], size = self._monotonic(), 0
                self._brought[stream] = size

    def _admit(self, stream: object) -> None:
        self._inside[stream] = self._monotonic()

    def _admit_next(self) -> None:
        while self._waiting and len(self._inside) < self._limit:
            stream, admitted = self._waiting.popleft()
            self._admit(stream)
            admitted.release()

    def _watch(self) -> None:
        while True:
            with self._lock:
                self._queue_began.wait(self._slow_after_s if self._waiting else None)
                long_ago = self._monotonic() - self._slow_after_s
                self._inside = {
                    stream: progress_at for stream, progress_at in self._inside.items() if progress_at > long_ago
                }
                self._brought = {stream: size for stream, size in self._brought.items() if stream in self._inside}
                self._admit_next()
