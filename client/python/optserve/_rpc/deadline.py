"""Ends calls: when their deadline passes, or when somebody cancels them.

A read of a gRPC stream has no time-out (grpc#20562), so one thread, the watchdog, watches the deadlines of all calls.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import ParamSpec, Self, TypeVar

from optserve._common.clock import SYSTEM, Clock, Thread
from optserve.errors import (
    DeadlineExceededError,
    OptserveError,
    StepCancelledError,
    UnavailableError,
    UnreachableError,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Watchdog:
    """Calls an action if its deadline passes before the action is disarmed. One thread serves all actions.

    Attributes:
        clock: The time.
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self.clock = clock
        # Reentrant: a garbage collection or a signal handler may disarm an action while this thread holds the lock.
        self._lock = clock.rlock()
        # A queue, because a token in it wakes the thread even if it does not wait yet: an action, or a garbage
        # collection, may call `close` or `arm` in the watchdog's own thread.
        self._wake = clock.queue()
        self._armed: dict[object, tuple[float, Callable[[], object]]] = {}
        self._wakes_at = float("inf")
        self._thread: Thread | None = None
        self._closed = False

    def arm(self, key: object, deadline: float, action: Callable[[], object]) -> None:
        """Call `action` at `deadline`, in seconds of this clock, unless `key` is disarmed before.

        `action` must not block. If the watchdog is closed, it is called at once.
        """
        with self._lock:
            if not self._closed:
                self._armed[key] = (deadline, action)
                if self._thread is None:
                    self._thread = self.clock.thread(self._run, "optserve-watchdog")
                    self._thread.start()
                # Wake the thread only for a deadline before its next check; most calls end long before their deadline.
                elif deadline < self._wakes_at:
                    self._wake.put(None)
                return
        action()

    def disarm(self, key: object) -> None:
        """Forget the action of that key."""
        with self._lock:
            self._armed.pop(key, None)

    def close(self) -> None:
        """End the thread, and call every action that is armed."""
        with self._lock:
            self._closed = True
            self._wake.put(None)

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                now = self.clock.monotonic()
                # Until the next deadline is known, `arm` always wakes the thread.
                self._wakes_at = math.inf
                self._call_due(now)
                self._wakes_at = min((deadline for deadline, _ in list(self._armed.values())), default=now + 3600.0)
                wait_s = max(self._wakes_at - now, 0.0)
            with suppress(Empty):
                self._wake.get(timeout=wait_s)
        with self._lock:
            for _, action in list(self._armed.values()):
                action()

    def _call_due(self, now: float) -> None:
        """Call the actions whose deadlines have passed.

        A method of its own: local names of `_run` would keep the last action, and with it an unused stream, alive.
        """
        for key, (deadline, action) in list(self._armed.items()):
            if deadline <= now:
                self._armed.pop(key, None)
                action()


class Cancellation:
    """Ends one call of the synchronous client, from any thread and wherever it waits. `optserve.aio` uses it."""

    def __init__(self) -> None:
        self._lock = SYSTEM.lock()
        self._cancelled = False
        self._actions: set[Callable[[], object]] = set()

    def run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Make a call in this thread; `cancel` ends everything that it waits for."""
        _thread_state.cancellation = self
        try:
            self.check()
            return call(*args, **kwargs)
        finally:
            _thread_state.cancellation = None

    def cancel(self) -> None:
        """End the call."""
        with self._lock:
            self._cancelled = True
            actions, self._actions = self._actions, set()
        for action in actions:
            action()

    def check(self) -> None:
        """Raise StepCancelledError if it was cancelled."""
        if self._cancelled:
            raise StepCancelledError("The call was cancelled; it may or may not have been carried out.")

    def add(self, action: Callable[[], object]) -> None:
        """Call `action` when the call is cancelled, at once if it was cancelled before. `action` must not block."""
        with self._lock:
            if not self._cancelled:
                self._actions.add(action)
                return
        action()

    @contextmanager
    def watching(self, action: Callable[[], object]) -> Iterator[None]:
        """Call `action` if the call is cancelled during the with-block. `action` must not block."""
        self.add(action)
        try:
            yield
        finally:
            with self._lock:
                self._actions.discard(action)


class _ThreadState(threading.local):
    cancellation: Cancellation | None = None


_thread_state = _ThreadState()


def cancellation() -> Cancellation | None:
    """The cancellation of the call that this thread makes; None if it has none."""
    return _thread_state.cancellation


class Patience:
    """The time limit of one call, and its cancellation.

    Args:
        watchdog: Watches the deadline.
        timeout_s: Seconds until the deadline.

    Attributes:
        timeout_s: As given, for messages.
        clock: The watchdog's clock.
    """

    def __init__(self, watchdog: Watchdog, timeout_s: float) -> None:
        self._watchdog = watchdog
        self.timeout_s = timeout_s
        self.clock = watchdog.clock
        self._monotonic = self.clock.monotonic
        self._deadline = self._monotonic() + timeout_s
        self._lock = self.clock.lock()
        self._cancelled = False
        self._settled = False
        self._action: Callable[[], object] | None = None
        if _thread_state.cancellation is not None:
            _thread_state.cancellation.add(self.cancel)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 when it has passed."""
        return max(self._deadline - self._monotonic(), 0.0)

    def cancel(self) -> bool:
        """End the call. Returns False if it has succeeded before. Safe from any thread."""
        with self._lock:
            if self._settled:
                return False
            self._cancelled = True
            action = self._action
        if action is not None:
            action()
        return True

    def settle(self) -> None:
        """Mark the call as succeeded; raise StepCancelledError if it was cancelled before."""
        with self._lock:
            self._settled = not self._cancelled
        if not self._settled:
            raise StepCancelledError("The step was cancelled just after the server had applied it.")

    def check(self) -> None:
        """Raise StepCancelledError if the call was cancelled, DeadlineExceededError if its deadline has passed."""
        if self._cancelled:
            raise StepCancelledError("The step was cancelled; it may or may not have been applied.")
        if self._monotonic() >= self._deadline:
            raise DeadlineExceededError(
                f"No answer within {self.timeout_s:g} s; the step may or may not have been applied."
            )

    def watching(self, action: Callable[[], object]) -> Self:
        """Call `action` if the patience ends from now until the end of the with-block. `action` must not block."""
        with self._lock:
            self._action = action
            cancelled = self._cancelled
        self._watchdog.arm(self, self._deadline, action)
        # `cancel` was called before the action was known, and has not called it.
        if cancelled:
            action()
        return self

    def __enter__(self) -> None:
        """See `watching`."""

    def __exit__(self, *_: object) -> None:
        """End watching."""
        self._watchdog.disarm(self)
        with self._lock:
            self._action = None

    @property
    def has_ended(self) -> bool:
        """Whether `check` would raise."""
        return self._cancelled or self._monotonic() >= self._deadline

    def pause(self, seconds: float, error: OptserveError) -> None:
        """Wait before the next try.

        Args:
            seconds: How long.
            error: The error of the last try.

        Raises:
            UnreachableError: The wait would pass the deadline, and the last try has reached no server.
            OptserveError: The wait would pass the deadline: `error` itself, or a DeadlineExceededError with its words
                if only this client would have known what to do about it.
            StepCancelledError: The call was cancelled during the wait.
        """
        if seconds >= self.left_s:
            raise self._error_at_deadline(error)
        wake = self.clock.event()
        # Closing the client ends the wait too; the next try then raises.
        with self.watching(wake.set):
            wake.wait(seconds)
        if not self._cancelled and self.left_s == 0.0:
            raise self._error_at_deadline(error)
        self.check()

    def _error_at_deadline(self, error: OptserveError) -> OptserveError:
        """The exception for the caller, if the deadline allows no more tries after `error`."""
        if isinstance(error, UnreachableError):
            return error
        if not isinstance(error, UnavailableError):
            if error.retry_after_s is not None:
                return error
            # A step that was taken over, or a worker that has to register: the caller never hears of these in time.
            return DeadlineExceededError(f"Not done within {self.timeout_s:g} s; the last error: {error.message}")
        if error.reason:
            return error
        return UnreachableError(f"No server was reached within {self.timeout_s:g} s; the last error: {error.message}")


class CallLock:
    """A lock that one call at a time holds. Waiting for it ends with the patience of the call that waits."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._held = clock.lock()
        self._released = clock.condition()
        self._waiting = 0

    def acquire(self, patience: Patience) -> None:
        """Wait for the lock.

        Raises:
            DeadlineExceededError, StepCancelledError: The patience has ended first.
        """
        if not self._held.acquire(blocking=False):
            self._wait(patience)
        try:
            patience.check()
        except BaseException:
            self.release()
            raise

    def _wait(self, patience: Patience) -> None:
        with patience.watching(self._wake), self._released:
            self._waiting += 1
            try:
                while not self._held.acquire(blocking=False):
                    patience.check()
                    self._released.wait(patience.left_s)
            finally:
                self._waiting -= 1

    def _wake(self) -> None:
        with self._released:
            self._released.notify_all()

    def release(self) -> None:
        """Give the lock to the next call."""
        self._held.release()
        if self._waiting:
            self._wake()
