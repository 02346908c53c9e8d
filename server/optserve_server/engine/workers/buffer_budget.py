"""The budget, in bytes, of the workers' staging buffers: one limit for all, and one for each optimizer."""

from __future__ import annotations

from collections import Counter, OrderedDict

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.workers.worker_slot import WorkerSlot

WAIT_S = 5.0
"""Seconds that a step waits for a buffer before it is refused. Its stream is not read, which slows the client."""


CHECK_EVERY_S = 1.0
"""Seconds between checks: a buffer that was locked when it could have been taken back causes no wake-up later."""


class _Waiting:
    """A step that waits for a buffer."""

    def __init__(self, step_slot: WorkerSlot, clock: Clock) -> None:
        self.step_slot = step_slot
        self.since = clock.monotonic()
        self.granted = clock.event()
        self.failure: Exception | None = None


class BufferBudget:
    """Gives step slots their buffers. Takes buffers back that only hold a reply, the oldest first.

    Args:
        max_bytes: Limit of all buffers; a single buffer may be larger.
        max_optimizer_bytes: Limit of one optimizer's buffers; a single buffer may be larger.
        wait_s: Seconds that a step waits for a buffer.
        clock: The time.
    """

    def __init__(self, max_bytes: int, max_optimizer_bytes: int, wait_s: float = WAIT_S, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_optimizer_bytes = max_optimizer_bytes
        self._wait_s = wait_s
        self._bytes: Counter[str] = Counter()
        self._lock = clock.lock()
        self._waiting: list[_Waiting] = []
        # Step slots whose buffers hold only a reply, the oldest first.
        self._idle: OrderedDict[WorkerSlot, None] = OrderedDict()

    def ensure_buffer(self, step_slot: WorkerSlot) -> None:
        """Give a step slot a buffer, if it has none. Waits for memory if needed; steps get it in their order.

        Raises:
            OptserveError: STAGING_FULL.
        """
        with self._lock:
            if step_slot.buffer is not None:
                return
            waiting = _Waiting(step_slot, self._clock)
            self._waiting.append(waiting)
            self._serve()
        until = self._clock.monotonic() + self._wait_s
        while not waiting.granted.wait(max(0.0, min(CHECK_EVERY_S, until - self._clock.monotonic()))):
            with self._lock:
                self._serve()
                if not waiting.granted.is_set() and self._clock.monotonic() >= until:
                    self._waiting.remove(waiting)
                    raise self._full(step_slot)
        if waiting.failure is not None:
            raise self._full(step_slot) from waiting.failure

    def _serve(self) -> None:
        """Give buffers to the steps that wait, in their order. An optimizer at its own limit delays no other one."""
        full: set[str] = set()
        for waiting in list(self._waiting):
            step_slot = waiting.step_slot
            if step_slot.optimizer in full:
                continue
            if step_slot.buffer is None:
                if not self._make_room(step_slot, step_slot.optimizer):
                    full.add(step_slot.optimizer)
                    continue
                if not self._make_room(step_slot):
                    # Otherwise later steps with smaller buffers would take all free memory, and this one would wait on.
                    break
                try:
                    step_slot.make_buffer()
                # This may run in another step's thread; the error belongs to the step that waits.
                except Exception as error:  # noqa: BLE001
                    waiting.failure = error
                else:
                    self._bytes[step_slot.optimizer] += step_slot.buffer_bytes
            self._waiting.remove(waiting)
            waiting.granted.set()

    def is_needed_elsewhere(self, step_slot: WorkerSlot) -> bool:
        """Whether another step has waited for long for the memory of this step slot, while its own step waits too."""
        with self._lock:
            long_ago = self._clock.monotonic() - CHECK_EVERY_S
            return any(
                waiting.since < long_ago
                and (waiting.step_slot.optimizer == step_slot.optimizer or self._is_in_the_way(waiting.step_slot))
                for waiting in self._waiting
            )

    def mark_in_use(self, step_slot: WorkerSlot) -> None:
        """A step holds the step slot's buffer."""
        with self._lock:
            self._idle.pop(step_slot, None)

    def mark_idle(self, step_slot: WorkerSlot) -> None:
        """The step has ended; its buffer may be taken back if another step needs the memory."""
        with self._lock:
            if step_slot.buffer is not None:
                self._idle[step_slot] = None
                if self._waiting:
                    self._serve()

    def refusal(self, step_slot: WorkerSlot) -> OptserveError:
        """The error STAGING_FULL for a step that has to give its buffer to others."""
        with self._lock:
            return self._full(step_slot)

    def reclaim(self, step_slot: WorkerSlot) -> None:
        """Take a step slot's buffer back at once."""
        with self._lock:
            self._reclaim(step_slot)
            self._serve()

    def _make_room(self, step_slot: WorkerSlot, optimizer: str = "") -> bool:
        """Whether a buffer fits into the limit of one optimizer, or of all; takes idle buffers back if that helps."""
        resting = [other for other in self._idle if other.optimizer == optimizer or not optimizer]
        if self._is_in_the_way(step_slot, optimizer, free=sum(other.buffer_bytes for other in resting)):
            return False
        for oldest in resting:
            if not self._is_in_the_way(step_slot, optimizer):
                break
            self._reclaim(oldest)
        return not self._is_in_the_way(step_slot, optimizer)

    def _is_in_the_way(self, step_slot: WorkerSlot, optimizer: str = "", free: int = 0) -> bool:
        """Whether the used bytes, less `free` bytes, leave too little for a step slot's buffer."""
        used, limit = (
            (self._bytes[optimizer], self._max_optimizer_bytes) if optimizer else (self._bytes.total(), self._max_bytes)
        )
        return used > free and used - free + step_slot.buffer_bytes > limit

    def _reclaim(self, step_slot: WorkerSlot) -> None:
        """Take a buffer back, unless a step holds it or its lock is taken."""
        if step_slot.buffer is None:
            return
        size_bytes = step_slot.buffer_bytes
        if step_slot.drop_buffer():
            self._idle.pop(step_slot, None)
            self._bytes[step_slot.optimizer] -= size_bytes
            if not self._bytes[step_slot.optimizer]:
                del self._bytes[step_slot.optimizer]

    def _full(self, step_slot: WorkerSlot) -> OptserveError:
        whose, used, limit = f"{step_slot.optimizer} has", self._bytes[step_slot.optimizer], self._max_optimizer_bytes
        if not self._is_in_the_way(step_slot, step_slot.optimizer):
            whose, used, limit = "this server has", self._bytes.total(), self._max_bytes
        return OptserveError(
            Reason.STAGING_FULL,
            f"Steps under way take {used} bytes; {whose} a limit of {limit} bytes. Try again later.",
            limit=limit,
        )
