"""The time, and everything that waits for something: locks, conditions, events, queues and threads.

Server and client take a clock when they are made, and have nothing of this kind from elsewhere. `SYSTEM` is that of the
machine. The simulation in `tests/simulation` has another, with which one thread does the work of all and hours pass in
an instant.
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
        """Take it."""
        ...

    def release(self) -> None:
        """Give it back."""
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
        """Wait until the predicate holds; gives its last value."""
        ...

    def notify_all(self) -> None:
        """Wake all who wait."""
        ...


class Event(Protocol):
    """See threading.Event."""

    def is_set(self) -> bool:
        """Whether it has happened."""
        ...

    def set(self) -> None:
        """Let it happen."""
        ...

    def clear(self) -> None:
        """Let it not have happened."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it; False after the time-out."""
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
        """Let it run."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        ...

    def is_alive(self) -> bool:
        """Whether it runs."""
        ...


class Clock:
    """The machine's own."""

    # The functions themselves: they are called several times in each step.
    monotonic = staticmethod(time.monotonic)
    """Seconds from some moment on; never goes back."""
    time_ns = staticmethod(time.time_ns)
    """Nanoseconds since 1970; goes back when somebody sets the machine's clock."""

    def now(self) -> datetime:
        """The time of day, in UTC."""
        return datetime.now(UTC)

    def lock(self) -> Lock:
        """A lock that is free."""
        return threading.Lock()

    def rlock(self) -> Lock:
        """A lock that is free, and that whoever has it may take again."""
        return threading.RLock()

    def condition(self, lock: Any = None) -> Condition:
        """A condition on one of this clock's locks; by default on an `rlock` of its own."""
        return threading.Condition(lock)

    def event(self) -> Event:
        """An event that has not happened."""
        return threading.Event()

    def queue(self) -> Queue:
        """An empty queue without a limit."""
        return queue.SimpleQueue()

    def thread(self, target: Callable[[], object], name: str) -> Thread:
        """A thread that is not running yet, and for which the process does not wait at its end."""
        return threading.Thread(target=target, name=name, daemon=True)


SYSTEM = Clock()
"""The clock of who is given none."""
