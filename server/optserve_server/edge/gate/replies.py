"""Counts the memory of unary replies that clients have not taken yet."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from optserve_server.domain.errors import OptserveError, Reason

CALL_BYTES = 16 << 10
"""Memory of a call beside its reply."""

SPARED_S = 1.0
"""Seconds for which a reply may wait before its call can be ended for a newcomer."""

SPARED_BESIDE_OTHERS_S = 0.1
"""The same, if its connection has more bytes waiting than the newcomer's."""

WAIT_S = 5.0
"""Seconds that a call waits for memory before it is refused with REPLIES_FULL."""


@dataclass(eq=False)
class _Reply:
    """A reply that its client has not taken."""

    size: int
    peer: str
    cancel: Callable[[], object]
    since: float = field(default_factory=time.monotonic)


class Replies:
    """Keeps untaken replies within `max_bytes`; a single one may be larger. Safe to use from several threads.

    Args:
        max_bytes: Memory of all untaken replies and their calls.
        end_after_s: Seconds after which a call whose reply is not taken is ended.
    """

    def __init__(self, max_bytes: int, end_after_s: float) -> None:
        self._max_bytes = max_bytes
        self._end_after_s = end_after_s
        # Reentrant: gRPC's event thread calls `_remove`, and may hold this lock already.
        self._room = threading.Condition(threading.RLock())
        self._bytes = 0
        self._untaken: dict[_Reply, None] = {}
        self._peers: Counter[str] = Counter()

    def add(self, size: int, peer: str, cancel: Callable[[], object]) -> Callable[[], None]:
        """Wait until there is memory for a reply, and count it.

        Args:
            size: Bytes of the reply.
            peer: The connection that it goes to.
            cancel: Ends its call.

        Returns:
            A function to call when the client has taken the reply, or is gone.

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
                        f"{self._bytes} bytes of replies wait for their clients; this server keeps at most "
                        f"{self._max_bytes} (max_reply_bytes). Try again later.",
                        limit_bytes=self._max_bytes,
                    )
                self._make_room(reply)
                if not self._fits(reply):
                    self._room.wait(SPARED_BESIDE_OTHERS_S)
            self._bytes += reply.size
            self._peers[peer] += reply.size
            reply.since = time.monotonic()
            self._untaken[reply] = None
        return lambda: self._remove(reply)

    def _fits(self, reply: _Reply) -> bool:
        return not self._bytes or self._bytes + reply.size <= self._max_bytes

    def _make_room(self, newcomer: _Reply) -> None:
        """End calls whose replies have waited too long, the oldest first, until the newcomer fits."""
        now, in_own_pool = time.monotonic(), self._peers[newcomer.peer] + newcomer.size
        for reply in tuple(self._untaken):
            if self._fits(newcomer):
                return
            spared_s = SPARED_BESIDE_OTHERS_S if self._peers[reply.peer] > in_own_pool else SPARED_S
            if now - reply.since >= spared_s:
                self._end(reply)

    def _end(self, reply: _Reply) -> None:
        self._remove(reply)
        reply.cancel()

    def _remove(self, reply: _Reply) -> None:
        with self._room:
            if reply in self._untaken:
                del self._untaken[reply]
                self._bytes -= reply.size
                self._peers[reply.peer] -= reply.size
                if not self._peers[reply.peer]:
                    del self._peers[reply.peer]
                self._room.notify_all()

    def end_overdue(self) -> int:
        """End the calls whose replies have waited longer than `end_after_s`; returns how many."""
        long_ago = time.monotonic() - self._end_after_s
        with self._room:
            late = [reply for reply in self._untaken if reply.since < long_ago]
        for reply in late:
            self._end(reply)
        return len(late)
