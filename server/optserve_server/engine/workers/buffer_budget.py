"""The room that the staging buffers of workers share, in bytes: a share of it for each optimizer."""

from __future__ import annotations

from collections import Counter, OrderedDict

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.workers.worker_slot import WorkerSlot

WAIT_S = 5.0
"""How long a step waits for room before it is refused; its stream is not read meanwhile, which slows the client."""


LOOK_EVERY_S = 1.0
"""Somebody may have looked at a buffer at the very moment when it could have been taken back, which nobody tells."""


class _Waiting:
    """A step that waits for a buffer of its step slot."""

    def __init__(self, step_slot: WorkerSlot, clock: Clock) -> None:
        self.step_slot = step_slot
        self.since = clock.monotonic()
        self.granted = clock.event()
        self.failure: Exception | None = None


class BufferBudget:
    """Gives step slots their buffers, and takes them back from those that only keep a reply, the oldest first.

    Args:
        max_bytes: Of all buffers together; one alone may be larger.
        max_optimizer_bytes: Of those of one optimizer; likewise.
        wait_s: How long a step waits.
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
        # Step slots whose buffer keeps a reply and nothing else.
        self._resting: OrderedDict[WorkerSlot, None] = OrderedDict()

    def equip(self, step_slot: WorkerSlot) -> None:
        """See to it that a step slot has a buffer, waiting for room if need be, in the order of those who came.

        Raises:
            OptserveError: STAGING_FULL.
        """
        with self._lock:
            if step_slot.equipped:
                return
            waiting = _Waiting(step_slot, self._clock)
            self._waiting.append(waiting)
            self._serve()
        until = self._clock.monotonic() + self._wait_s
        while not waiting.granted.wait(max(0.0, min(LOOK_EVERY_S, until - self._clock.monotonic()))):
            with self._lock:
                self._serve()
                if not waiting.granted.is_set() and self._clock.monotonic() >= until:
                    self._waiting.remove(waiting)
                    raise self._full(step_slot)
        if waiting.failure is not None:
            raise self._full(step_slot) from waiting.failure

    def _serve(self) -> None:
        """Give buffers to those who wait, the first ones first; an optimizer at its own limit holds up no other."""
        full: set[str] = set()
        for waiting in list(self._waiting):
            step_slot = waiting.step_slot
            if step_slot.optimizer in full:
                continue
            if not step_slot.equipped:
                if not self._make_room(step_slot, step_slot.optimizer):
                    full.add(step_slot.optimizer)
                    continue
                if not self._make_room(step_slot):
                    # Smaller ones that come later would take each free piece, and this one would never have enough.
                    break
                try:
                    step_slot.equip()
                # Whichever thread has made room, it is for this one that there is no memory.
                except Exception as error:  # noqa: BLE001
                    waiting.failure = error
                else:
                    self._bytes[step_slot.optimizer] += step_slot.buffer_bytes
            self._waiting.remove(waiting)
            waiting.granted.set()

    def is_wanted(self, step_slot: WorkerSlot) -> bool:
        """Whether somebody has waited for long for what this step slot has, which itself waits for others."""
        with self._lock:
            long_ago = self._clock.monotonic() - LOOK_EVERY_S
            return any(
                waiting.since < long_ago
                and (waiting.step_slot.optimizer == step_slot.optimizer or self._is_in_the_way(waiting.step_slot))
                for waiting in self._waiting
            )

    def use(self, step_slot: WorkerSlot) -> None:
        """A step holds the step slot's buffer."""
        with self._lock:
            self._resting.pop(step_slot, None)

    def rest(self, step_slot: WorkerSlot) -> None:
        """The step slot's step has ended; its buffer may be taken back if somebody needs the room."""
        with self._lock:
            if step_slot.equipped:
                self._resting[step_slot] = None
                self._serve()

    def refusal(self, step_slot: WorkerSlot) -> OptserveError:
        """What a step is refused with that gives its buffer up for others."""
        with self._lock:
            return self._full(step_slot)

    def strip(self, step_slot: WorkerSlot) -> None:
        """Take a step slot's buffer back at once."""
        with self._lock:
            self._strip(step_slot)
            self._serve()

    def _make_room(self, step_slot: WorkerSlot, optimizer: str = "") -> bool:
        """Whether a buffer fits into the room of one optimizer, or of all; takes others back if that helps."""
        resting = [other for other in self._resting if other.optimizer == optimizer or not optimizer]
        if self._is_in_the_way(step_slot, optimizer, free=sum(other.buffer_bytes for other in resting)):
            return False
        for oldest in resting:
            if not self._is_in_the_way(step_slot, optimizer):
                break
            self._strip(oldest)
        return not self._is_in_the_way(step_slot, optimizer)

    def _is_in_the_way(self, step_slot: WorkerSlot, optimizer: str = "", free: int = 0) -> bool:
        """Whether what is used, apart from what is `free`, leaves too little for a step slot's buffer."""
        used, limit = (
            (self._bytes[optimizer], self._max_optimizer_bytes) if optimizer else (self._bytes.total(), self._max_bytes)
        )
        return used > free and used - free + step_slot.buffer_bytes > limit

    def _strip(self, step_slot: WorkerSlot) -> None:
        """Take a buffer back, unless a step has begun to use it, or somebody looks at it this very moment."""
        if step_slot.equipped and step_slot.strip():
            self._resting.pop(step_slot, None)
            self._bytes[step_slot.optimizer] -= step_slot.buffer_bytes
            if not self._bytes[step_slot.optimizer]:
                del self._bytes[step_slot.optimizer]

    def _full(self, step_slot: WorkerSlot) -> OptserveError:
        whose, used, limit = f"{step_slot.optimizer} has", self._bytes[step_slot.optimizer], self._max_optimizer_bytes
        if not self._is_in_the_way(step_slot, step_slot.optimizer):
            whose, used, limit = "this server has", self._bytes.total(), self._max_bytes
        return OptserveError(
            Reason.STAGING_FULL,
            f"Steps under way take {used} bytes, and {limit} are all that {whose} room for; try again later.",
            limit=limit,
        )
