"""Kinds of calls, each with places and threads of its own, so that no call waits for those of another kind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge.gate.places import Places

QUEUE_WAIT_S = 10.0
"""Seconds that a unary call may wait for a thread before it is refused with TOO_MANY_STREAMS."""


class Kind:
    """A kind of calls, with its places and threads.

    Args:
        name: Name of the threads.
        places: The places of these calls.
        limit: Most calls with a thread, those without a place included.

    Attributes:
        pool: The threads.
    """

    def __init__(self, name: str, places: Places, limit: int) -> None:
        self.places = places
        self.pool = ThreadPoolExecutor(limit, thread_name_prefix=name)
        self._free = threading.BoundedSemaphore(limit)

    def enter(self) -> bool:
        """Reserve a thread for a call; False if there is none. Called in gRPC's event thread."""
        return self._free.acquire(blocking=False)

    def in_own_pool(self, behaviour: Any) -> Any:
        """Let gRPC call this method in the threads of the kind."""
        behaviour.experimental_thread_pool = self.pool
        return behaviour

    def leave(self) -> None:
        """Give a reserved thread back."""
        self._free.release()


class ConcurrencyLimit:
    """Lets `threads` calls be answered at a time; the others wait."""

    def __init__(self, threads: int) -> None:
        self._free = threading.BoundedSemaphore(threads)
        self._threads = threads

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be one of these calls for the length of a with-block, or raise TOO_MANY_STREAMS after QUEUE_WAIT_S."""
        if not self._free.acquire(timeout=QUEUE_WAIT_S):
            raise OptserveError(
                Reason.TOO_MANY_STREAMS,
                f"This server answers {self._threads} calls at a time, and all of them are busy; try again.",
                limit=self._threads,
            )
        try:
            yield
        finally:
            self._free.release()
