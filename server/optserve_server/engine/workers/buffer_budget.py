"""The room that the staging buffers of workers share, in bytes: a share of it for each optimizer."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.step_slot import Lane

WAIT_S = 5.0
"""How long a step waits for room before it is refused; its stream is not read meanwhile, which slows the client."""


LOOK_EVERY_S = 1.0
"""Somebody may have looked at a buffer at the very moment when it could have been taken back, which nobody tells."""


class _Waiting:
    """A step that waits for a buffer of its lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.since = time.monotonic()
        self.granted = threading.Event()
        self.failure: Exception | None = None


class Room:
    """Gives lanes their buffers, and takes them back from those that only keep a reply, the oldest first.

    Args:
        max_bytes: Of all buffers together; one alone may be larger.
        max_optimizer_bytes: Of those of one optimizer; likewise.
        wait_s: How long a step waits.
    """

    def __init__(self, max_bytes: int, max_optimizer_bytes: int, wait_s: float = WAIT_S) -> None:
        self._max_bytes = max_bytes
        self._max_optimizer_bytes = max_optimizer_bytes
        self._wait_s = wait_s
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        # Lanes whose buffer keeps a reply and nothing else.
        self._resting: OrderedDict[Lane, None] = OrderedDict()

    def equip(self, lane: Lane) -> None:
        """See to it that a lane has a buffer, waiting for room if need be, in the order of those who came.

        Raises:
            OptserveError: STAGING_FULL.
        """
        with self._lock:
            if lane.equipped:
                return
            waiting = _Waiting(lane)
            self._waiting.append(waiting)
            self._serve()
        until = time.monotonic() + self._wait_s
        while not waiting.granted.wait(max(0.0, min(LOOK_EVERY_S, until - time.monotonic()))):
            with self._lock:
                self._serve()
                if not waiting.granted.is_set() and time.monotonic() >= until:
                    self._waiting.remove(waiting)
                    raise self._full(lane)
        if waiting.failure is not None:
            raise self._full(lane) from waiting.failure

    def _serve(self) -> None:
        """Give buffers to those who wait, the first ones first; an optimizer at its own limit holds up no other."""
        full: set[str] = set()
        for waiting in list(self._waiting):
            lane = waiting.lane
            if lane.optimizer in full:
                continue
            if not lane.equipped:
                if not self._make_room(lane, lane.optimizer):
                    full.add(lane.optimizer)
                    continue
                if not self._make_room(lane):
                    # Smaller ones that come later would take each free piece, and this one would never have enough.
                    break
                try:
                    lane.equip()
                # Whichever thread has made room, it is for this one that there is no memory.
                except Exception as error:  # noqa: BLE001
                    waiting.failure = error
                else:
                    self._bytes[lane.optimizer] += lane.buffer_bytes
            self._waiting.remove(waiting)
            waiting.granted.set()

    def is_wanted(self, lane: Lane) -> bool:
        """Whether somebody has waited for long for what this lane has, which itself waits for others."""
        with self._lock:
            long_ago = time.monotonic() - LOOK_EVERY_S
            return any(
                waiting.since < long_ago
                and (waiting.lane.optimizer == lane.optimizer or self._is_in_the_way(waiting.lane))
                for waiting in self._waiting
            )

    def use(self, lane: Lane) -> None:
        """A step holds the lane's buffer."""
        with self._lock:
            self._resting.pop(lane, None)

    def rest(self, lane: Lane) -> None:
        """The lane's step has ended; its buffer may be taken back if somebody needs the room."""
        with self._lock:
            if lane.equipped:
                self._resting[lane] = None
                self._serve()

    def refusal(self, lane: Lane) -> OptserveError:
        """What a step is refused with that gives its buffer up for others."""
        with self._lock:
            return self._full(lane)

    def strip(self, lane: Lane) -> None:
        """Take a lane's buffer back at once."""
        with self._lock:
            self._strip(lane)
            self._serve()

    def _make_room(self, lane: Lane, optimizer: str = "") -> bool:
        """Whether a lane's buffer fits into the room of one optimizer, or of all; takes others back if that helps."""
        resting = [other for other in self._resting if other.optimizer == optimizer or not optimizer]
        if self._is_in_the_way(lane, optimizer, free=sum(other.buffer_bytes for other in resting)):
            return False
        for oldest in resting:
            if not self._is_in_the_way(lane, optimizer):
                break
            self._strip(oldest)
        return not self._is_in_the_way(lane, optimizer)

    def _is_in_the_way(self, lane: Lane, optimizer: str = "", free: int = 0) -> bool:
        """Whether what is used, apart from what is `free`, leaves too little for a lane's buffer."""
        used, limit = (
            (self._bytes[optimizer], self._max_optimizer_bytes) if optimizer else (self._bytes.total(), self._max_bytes)
        )
        return used > free and used - free + lane.buffer_bytes > limit

    def _strip(self, lane: Lane) -> None:
        """Take a buffer back, unless a step has begun to use it, or somebody looks at it this very moment."""
        if lane.equipped and lane.strip():
            self._resting.pop(lane, None)
            self._bytes[lane.optimizer] -= lane.buffer_bytes
            if not self._bytes[lane.optimizer]:
                del self._bytes[lane.optimizer]

    def _full(self, lane: Lane) -> OptserveError:
        whose, used, limit = f"{lane.optimizer} has", self._bytes[lane.optimizer], self._max_optimizer_bytes
        if not self._is_in_the_way(lane, lane.optimizer):
            whose, used, limit = "this server has", self._bytes.total(), self._max_bytes
        return OptserveError(
            Reason.STAGING_FULL,
            f"Steps under way take {used} bytes, and {limit} are all that {whose} room for; try again later.",
            limit=limit,
        )
