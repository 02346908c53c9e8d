"""A queue for changes that come between two steps, also where steps follow one another without a pause."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from optserve._common.clock import Condition
from optserve_server.engine.step_slot import ClientSlot

WAIT_S = 10.0
"""Longest wait of a change for the end of the step under way, and of a new step for the changes before it."""


class ChangeQueue:
    """The changes of one optimizer that wait for the end of its step, in the order in which they came.

    Args:
        lock: The optimizer's.
        step_slot: That of its client.

    Attributes:
        waiting: An object for each of these changes.
    """

    def __init__(self, lock: Condition, step_slot: ClientSlot) -> None:
        self._lock = lock
        self._step_slot = step_slot
        self.waiting: deque[object] = deque()

    @contextmanager
    def between_steps(self, wait_s: float = WAIT_S) -> Iterator[None]:
        """Let no step be under way for the length of a with-block. The lock is free in the block.

        The step under way ends first; steps that begin later wait for the end of the block.

        Args:
            wait_s: Longest time to wait for the step under way, and for changes that came before.

        Raises:
            OptserveError: STEP_IN_PROGRESS, when the time is up.
        """
        place = object()
        with self._lock:
            self.waiting.append(place)
            self._step_slot.on_free = self._wake
        try:
            with self._lock:
                if not self._lock.wait_for(lambda: self.waiting[0] is place and self._is_free(), wait_s):
                    raise self._step_slot.in_progress()
            yield
        finally:
            with self._lock:
                self.waiting.remove(place)
                if not self.waiting:
                    self._step_slot.on_free = None
                self._lock.notify_all()

    def wait_to_begin(self) -> None:
        """Wait, with the lock held once, for the changes that came before this step; raises STEP_IN_PROGRESS."""
        # While a step is under way, they wait for it, and so it must be able to go on on another connection.
        if self.waiting and self._step_slot.holder is None:
            last = self.waiting[-1]
            if not self._lock.wait_for(lambda: last not in self.waiting, WAIT_S):
                raise self._step_slot.in_progress()

    def _is_free(self) -> bool:
        return self._step_slot.holder is None

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()
