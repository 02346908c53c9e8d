"""A clock gives the time, and everything that can wait: locks, conditions, events, queues and threads.

Server and client get a clock when they are made, and take all of these from it. `SYSTEM` is the clock of the machine.
The simulation in `tests/simulation` has another one: one thread does the work of all threads, and hours pass in an
instant.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")


class Lock(Protocol):
    """See threading.Lock and threading.RLock."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; returns whether it was free in time."""
        ...

    def release(self) -> None:
        """Free the lock."""
        ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None, /
    ) -> object: ...


class Condition(Lock, Protocol):
    """See threading.Condition."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait to be notified; False after the time-out."""
        ...

    def wait_for(self, predicate: Callable[[], _T], timeout: float | None = None) -> _T:
        """Wait until the predicate holds; returns its last value."""
        ...

    def notify_all(self) -> None:
        """Wake all threads that wait."""
        ...


class Event(Protocol):
    """See threading.Event."""

    def is_set(self) -> bool:
        """Whether the event is set."""
        ...

    def set(self) -> None:
        """Set the event, and wake all threads that wait for it."""
        ...

    def clear(self) -> None:
        """Reset the event."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set; False after the time-out."""
        ...


class Queue(Protocol):
    """See queue.SimpleQueue."""

    def put(self, item: Any) -> None:
        """Append an item."""
        ...

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first item; raises queue.Empty after the time-out."""
        ...


class Thread(Protocol):
    """See threading.Thread."""

    def start(self) -> None:
        """Start the thread."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread ends, or for `timeout` seconds."""
        ...

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        ...


class Clock:
    """The clock of the machine."""

    # The functions themselves, without a method around them: each step calls them several times.
    monotonic = staticmethod(time.monotonic)
    """Seconds since some moment; never goes back."""
    time_ns = staticmethod(time.time_ns)
    """Nanoseconds since 1970; may go back when a user sets the machine's clock."""

    def now(self) -> datetime:
        """The time of day, in UTC."""
        return datetime.now(UTC)

    def lock(self) -> Lock:
        """A lock, free."""
        return threading.Lock()

    def rlock(self) -> Lock:
        """A reentrant lock, free."""
        return threading.RLock()

    def condition(self, lock: Any = None) -> Condition:
        """A condition on one of this clock's locks; by default on an `rlock` of its own."""
        return threading.Condition(lock)

    def event(self) -> Event:
        """An event that is not set."""
        return threading.Event()

    def queue(self) -> Queue:
        """An empty queue without a limit."""
        return queue.SimpleQueue()

    def thread(self, target: Callable[[], object], name: str) -> Thread:
        """A thread that does not run yet. The process does not wait for it when it ends."""
        return threading.Thread(target=target, name=name, daemon=True)


SYSTEM = Clock()
"""The default clock."""
