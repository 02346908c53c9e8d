"""The clock of one process in virtual time: what is locked, waited for and started there is so by tasks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from queue import Empty
from types import TracebackType
from typing import Any

from optserve._common.clock import Clock

from .world import Killed, Process, Task

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class VirtualLock:
    """A lock between tasks. To those of a process that has ended it is always free."""

    def __init__(self, process: Process, *, reentrant: bool) -> None:
        self._process = process
        self._world = process.world
        self._reentrant = reentrant
        self.waiting: list[Task] = []
        self.owner: Task | None = None
        self.count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        world = self._world
        if not self._process.alive:
            return True
        if blocking:
            world.preempt()
        until = world.now + timeout
        while self.count and not (self._reentrant and self.owner is world.current):
            left = until - world.now if timeout >= 0 else None
            if not blocking or (left is not None and left <= 0):
                return False
            world.wait(self.waiting, "a lock", left)
        self.owner = world.current
        self.count += 1
        return True

    def release(self) -> None:
        if not self._process.alive:
            return
        if not self.count:
            raise RuntimeError("This lock is free.")
        self.count -= 1
        if not self.count:
            self.owner = None
            self._world.wake_one(self.waiting)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class VirtualCondition:
    """A condition on such a lock."""

    def __init__(self, process: Process, lock: VirtualLock) -> None:
        self._process = process
        self._world = process.world
        self._lock = lock
        self._waiting: list[Task] = []
        self.acquire = lock.acquire
        self.release = lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        lock, world = self._lock, self._world
        if not self._process.alive:
            raise Killed
        if lock.owner is not world.current:
            raise RuntimeError("Who waits on a condition has its lock.")
        count, lock.count, lock.owner = lock.count, 0, None
        world.wake_one(lock.waiting)
        notified = world.wait(self._waiting, "a condition", timeout)
        while lock.count:
            world.wait(lock.waiting, "the lock of a condition")
        lock.owner, lock.count = world.current, count
        return notified

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until = None if timeout is None else self._world.now + timeout
        while not (found := predicate()):
            left = None if until is None else until - self._world.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return found

    def notify_all(self) -> None:
        self._world.wake_all(self._waiting)


class VirtualEvent:
    """An event among tasks."""

    def __init__(self, process: Process) -> None:
        self._world = process.world
        self._waiting: list[Task] = []
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._world.wake_all(self._waiting)

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            self._world.wait(self._waiting, "an event", timeout)
        return self._is_set


class VirtualQueue:
    """A queue among tasks."""

    def __init__(self, process: Process) -> None:
        self._world = process.world
        self._waiting: list[Task] = []
        self._items: list[Any] = []

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._world.wake_one(self._waiting)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        world = self._world
        until = None if timeout is None else world.now + timeout
        while not self._items:
            left = None if until is None else until - world.now
            if not block or (left is not None and left <= 0):
                raise Empty
            world.wait(self._waiting, "an item of a queue", left)
        return self._items.pop(0)


class VirtualThread:
    """A task, as a thread of its process."""

    def __init__(self, process: Process, target: Callable[[], object], name: str) -> None:
        self._process = process
        self._target = target
        self._name = name
        self._task: Task | None = None

    def start(self) -> None:
        self._task = self._process.start(self._target, self._name)

    def join(self, timeout: float | None = None) -> None:
        if self._task is not None and not self._task.ended:
            self._process.world.wait(self._task.joining, f"the end of {self._name}", timeout)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.ended


class VirtualClock(Clock):
    """The clock of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        # Clocks of different machines have nothing to do with one another.
        self._offset = process.world.random.uniform(0, 1e6)

    def monotonic(self) -> float:
        return self._world.now + self._offset

    def time_ns(self) -> int:
        return int(EPOCH.timestamp()) * 10**9 + int(self._world.now * 1e9)

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self._world.now)

    def lock(self) -> VirtualLock:
        return VirtualLock(self._process, reentrant=False)

    def rlock(self) -> VirtualLock:
        return VirtualLock(self._process, reentrant=True)

    def condition(self, lock: VirtualLock | None = None) -> VirtualCondition:
        return VirtualCondition(self._process, lock or self.rlock())

    def event(self) -> VirtualEvent:
        return VirtualEvent(self._process)

    def queue(self) -> VirtualQueue:
        return VirtualQueue(self._process)

    def thread(self, target: Callable[[], object], name: str) -> VirtualThread:
        return VirtualThread(self._process, target, name)
