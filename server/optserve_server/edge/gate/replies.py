"""Replies of unary calls that their clients have not taken yet: they lie in memory, and all of them are counted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from optserve_server.domain.errors import OptserveError, Reason

CALL_BYTES = 16 << 10
"""What a call takes beside its reply until that is taken."""

SPARED_S = 1.0
"""A reply that has lain for less makes no room for others,"""

SPARED_BESIDE_OTHERS_S = 0.1
"""unless its connection has more lying than the newcomer's."""

WAIT_S = 5.0
"""How long a call waits for room before it is told to come back."""


@dataclass(eq=False)
class _Reply:
    """One that lies."""

    size: int
    peer: str
    cancel: Callable[[], object]
    since: float = field(default_factory=time.monotonic)


class Replies:
    """Keeps all of them within `max_bytes`; one alone may be larger. Safe to use from several threads.

    Args:
        max_bytes: Of all, with the calls that they belong to.
        ends_s: A call whose reply has not been taken for so long is ended.
    """

    def __init__(self, max_bytes: int, ends_s: float) -> None:
        self._max_bytes = max_bytes
        self._ends_s = ends_s
        # Released from gRPC's only event thread, which may hold this lock already in the middle of something.
        self._room = threading.Condition(threading.RLock())
        self._bytes = 0
        self._lying: dict[_Reply, None] = {}
        self._peers: Counter[str] = Counter()

    def add(self, size: int, peer: str, cancel: Callable[[], object]) -> Callable[[], None]:
        """Count a reply, once there is room for it.

        Args:
            size: Its bytes.
            peer: The connection that it goes to.
            cancel: Ends its call, should it not be taken.

        Returns:
            What is to be called when it has been taken, or is gone.

        Raises:
            OptserveError: REPLIES_FULL.
        """
        reply = _Reply(size + CALL_BYTES, peer, cancel)
        until = time.monotonic() + WAIT_S
        with self._room:
            while not self._fits(reply):
                if time.monotonic() >= until:
                    raise OptserveError(
                        Reason.REPLIES_FULL,
                        f"{self._bytes} bytes of replies wait for clients to take them, and {self._max_bytes} are all "
                        "that this server has room for; try again later.",
                        limit_bytes=self._max_bytes,
                    )
                self._make_room(reply)
                if not self._fits(reply):
                    self._room.wait(SPARED_BESIDE_OTHERS_S)
            self._bytes += reply.size
            self._peers[peer] += reply.size
            reply.since = time.monotonic()
            self._lying[reply] = None
        return lambda: self._remove(reply)

    def _fits(self, reply: _Reply) -> bool:
        return not self._bytes or self._bytes + reply.size <= self._max_bytes

    def _make_room(self, newcomer: _Reply) -> None:
        """End calls whose replies have lain too long, the oldest first, until the newcomer has room."""
        now, own = time.monotonic(), self._peers[newcomer.peer] + newcomer.size
        for reply in tuple(self._lying):
            if self._fits(newcomer):
                return
            spared_s = SPARED_BESIDE_OTHERS_S if self._peers[reply.peer] > own else SPARED_S
            if now - reply.since >= spared_s:
                self._end(reply)

    def _end(self, reply: _Reply) -> None:
        self._remove(reply)
        reply.cancel()

    def _remove(self, reply: _Reply) -> None:
        with self._room:
            if reply in self._lying:
                del self._lying[reply]
                self._bytes -= reply.size
                self._peers[reply.peer] -= reply.size
                if not self._peers[reply.peer]:
                    del self._peers[reply.peer]
                self._room.notify_all()

    def end_those_not_taken(self) -> int:
        """Look after all; gives how many were ended."""
        long_ago = time.monotonic() - self._ends_s
        with self._room:
            late = [reply for reply in self._lying if reply.since < long_ago]
        for reply in late:
            self._end(reply)
        return len(late)
