"""How long a call may take: until its deadline passes or somebody cancels it.

A read of a gRPC stream has no time-out of its own (grpc#20562), so a thread watches the clock for all of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import ParamSpec, TypeVar

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
    """Calls an action when its deadline passes before it is disarmed. One thread serves all.

    Attributes:
        clock: The time.
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self.clock = clock
        # To be taken again by what is collected, or interrupted, while it is held.
        self._lock = clock.rlock()
        # Wakes the thread, also if it does not wait yet: an action, or what is collected meanwhile, may close or arm in
        # the thread itself.
        self._wake = clock.queue()
        self._armed: dict[object, tuple[float, Callable[[], object]]] = {}
        self._wakes_at = float("inf")
        self._thread: Thread | None = None
        self._closed = False

    def arm(self, key: object, deadline: float, action: Callable[[], object]) -> None:
        """Call `action`, which must not block, unless `key` is disarmed before `deadline`, by this clock.

        Once this is closed it is called at once.
        """
        with self._lock:
            if not self._closed:
                self._armed[key] = (deadline, action)
                if self._thread is None:
                    self._thread = self.clock.thread(self._run, "optserve-watchdog")
                    self._thread.start()
                # The thread is woken for a deadline before its next look only; most waits end long before theirs.
                elif deadline < self._wakes_at:
                    self._wake.put(None)
                return
        action()

    def disarm(self, key: object) -> None:
        """Do not call the action of that key any more."""
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
                # Whoever arms before this is known wakes the thread.
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

        Not where the thread waits: names there would keep the last action, and with it a stream that nobody uses.
        """
        for key, (deadline, action) in list(self._armed.items()):
            if deadline <= now:
                self._armed.pop(key, None)
                action()


class Cancellation:
    """Ends one call of the synchronous client, from any thread and wherever it waits; `optserve.aio` is made of it."""

    def __init__(self) -> None:
        self._lock = SYSTEM.lock()
        self._cancelled = False
        self._actions: set[Callable[[], object]] = set()

    def run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Make a call that this can end; whatever it waits for in this thread is ended with it."""
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
        """Call `action`, which must not block, when the call is cancelled; at once if it was."""
        with self._lock:
            if not self._cancelled:
                self._actions.add(action)
                return
        action()

    @contextmanager
    def watching(self, action: Callable[[], object]) -> Iterator[None]:
        """What `add` does, for the length of a with-block."""
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
    """What can end the call that this thread makes; None where nobody can."""
    return _thread_state.cancellation


class Patience:
    """The patience of one call.

    Args:
        watchdog: Watches the deadline, by its clock.
        timeout_s: From now on.

    Attributes:
        timeout_s: The same, in whole, for messages.
        clock: The time.
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
        """End the call, from any thread; False if it had succeeded before."""
        with self._lock:
            if self._settled:
                return False
            self._cancelled = True
            action = self._action
        if action is not None:
            action()
        return True

    def settle(self) -> None:
        """The call has succeeded; raise StepCancelledError if it was cancelled before."""
        with self._lock:
            self._settled = not self._cancelled
        if not self._settled:
            raise StepCancelledError("The step was cancelled when it had just been applied.")

    def check(self) -> None:
        """Raise StepCancelledError or DeadlineExceededError if it is at its end."""
        if self._cancelled:
            raise StepCancelledError("The step was cancelled; it may or may not have been applied.")
        if self._monotonic() >= self._deadline:
            raise DeadlineExceededError(
                f"No answer within {self.timeout_s:g} s; the step may or may not have been applied."
            )

    def watching(self, action: Callable[[], object]) -> _Watching:
        """Call `action`, which must not block, when patience ends before the with-block does."""
        return _Watching(self, action)

    def start(self, action: Callable[[], object]) -> None:
        """What `watching` does at its beginning."""
        with self._lock:
            self._action = action
            cancelled = self._cancelled
        self._watchdog.arm(self, self._deadline, action)
        # Cancelled before the action was in place: nobody else will call it.
        if cancelled:
            action()

    def stop(self) -> None:
        """What `watching` does at its end."""
        self._watchdog.disarm(self)
        with self._lock:
            self._action = None

    @property
    def has_ended(self) -> bool:
        """Whether `check` would raise."""
        return self._cancelled or self._monotonic() >= self._deadline

    def pause(self, seconds: float, error: OptserveError) -> None:
        """Wait before another try.

        Raises:
            UnreachableError: That would be beyond the deadline, and `error` is only that no server was reached.
            OptserveError: `error` itself, where the server has said more.
            StepCancelledError, DeadlineExceededError: Patience has ended meanwhile.
        """
        if seconds >= self.left_s:
            raise self._error_at_deadline(error)
        wake = self.clock.event()
        # Also woken when the client is closed; the next try then says so.
        with self.watching(wake.set):
            wake.wait(seconds)
        self.check()

    def _error_at_deadline(self, error: OptserveError) -> OptserveError:
        """What to raise where `error` is the end of the last try that the deadline allows."""
        if not isinstance(error, UnavailableError) or error.reason or isinstance(error, UnreachableError):
            return error
        return UnreachableError(f"No success within {self.timeout_s:g} s; at last: {error.message}")


class _Watching:
    """The with-block of `Patience.watching`; a class, because every step goes through it."""

    def __init__(self, patience: Patience, action: Callable[[], object]) -> None:
        self._patience = patience
        self._action = action

    def __enter__(self) -> None:
        self._patience.start(self._action)

    def __exit__(self, *_: object) -> None:
        self._patience.stop()


class CallLock:
    """What one call at a time has. Whoever waits for it gives up when its patience ends."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._held = clock.lock()
        self._released = clock.condition()
        self._waiting = 0

    def acquire(self, patience: Patience) -> None:
        """Wait for it.

        Raises:
            DeadlineExceededError, StepCancelledError: Patience has ended first.
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
        """Let the next one have it."""
        self._held.release()
        if self._waiting:
            self._wake()
