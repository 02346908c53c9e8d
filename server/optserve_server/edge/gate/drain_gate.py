"""Admits steps until the server drains, and waits for the admitted ones to end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from optserve_server.domain.errors import OptserveError, Reason


class DrainGate:
    """Counts the steps under way."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._drained = threading.Condition(self._lock)
        self._under_way = 0
        self._draining = False

    def enter(self) -> None:
        """Admit a step, or raise DRAINING."""
        with self._lock:
            if self._draining:
                raise OptserveError(Reason.DRAINING, "This server is about to stop; try again when it is back.")
            self._under_way += 1

    def leave(self) -> None:
        """An admitted step has ended."""
        with self._lock:
            self._under_way -= 1
            if self._draining:
                self._drained.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Admit a step for the length of a with-block, or raise DRAINING."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def close(self) -> None:
        """Admit no more steps."""
        with self._lock:
            self._draining = True

    def drain(self, timeout_s: float) -> bool:
        """Wait until all admitted steps have ended; False if some have not within `timeout_s`. Call `close` first."""
        with self._lock:
            return self._drained.wait_for(lambda: self._under_way == 0, timeout_s)
