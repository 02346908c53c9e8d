"""Deadlines for what has none of its own: a blocked read of a gRPC stream (grpc#20562)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watchdog:
    """Calls an action when its deadline passes before its with-block ends. One thread serves all."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._armed: dict[object, tuple[float, Callable[[], object]]] = {}
        self._wakes_at = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def watch(self, deadline: float, action: Callable[[], object]) -> Iterator[None]:
        """Call `action`, which must not block, if the block is not left before `deadline` (time.monotonic)."""
        key = object()
        with self._condition:
            self._armed[key] = (deadline, action)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="optserve-watchdog", daemon=True)
                self._thread.start()
            # The thread is woken for a deadline before its next look only; most blocks end long before theirs.
            elif deadline < self._wakes_at:
                self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                self._armed.pop(key, None)

    def close(self) -> None:
        """End the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                for key, (deadline, action) in list(self._armed.items()):
                    if deadline <= now:
                        del self._armed[key]
                        action()
                self._wakes_at = min((deadline for deadline, _ in self._armed.values()), default=now + 3600.0)
                self._condition.wait(self._wakes_at - now)
