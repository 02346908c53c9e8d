"""The places of one kind of calls. Their number is limited, and a call keeps its place only while its client acts.

A call has a thread while it has a place. If all places are taken, a newcomer evicts a call that waits for its client.
If no call can be evicted, the newcomer is refused with a retry hint. A call that waits too long is ended in any case.

gRPC does not report how much of a message has arrived. So a call with one large message is given the time that the
largest message takes, if it is one of the first `protected` calls. The other places are for newcomers.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto

from optserve_server.domain.errors import OptserveError, Reason

SPARED_S = 2.0
"""Seconds for which a call may wait for its message before a newcomer can evict it. A newcomer from a connection with
fewer places can do so at once."""

MIN_BYTES_PER_S = 64 << 10
"""Least average rate of a transfer, and of a call's only message."""


class Waiting(Enum):
    """What a call waits for its client to do."""

    NOTHING = auto()
    """The server is at work."""
    FIRST_MESSAGE = auto()
    NEXT_MESSAGE = auto()
    DELIVERY = auto()
    """The client has to take a message."""


# Python finds a member in its Enum in 80 ns, and each message of a stream has four of them to look at.
NOTHING, FIRST_MESSAGE, NEXT_MESSAGE, DELIVERY = Waiting


@dataclass(frozen=True)
class WaitLimits:
    """How long calls of one kind may wait for their clients, in seconds, by what they wait for.

    Attributes:
        evict_after_s: Seconds after which a newcomer can evict the call; never, for what is not named.
        end_after_s: Seconds after which the call is ended; never, for what is not named.
        by_bytes: Whether `end_after_s` limits the whole wait, to which each byte of progress adds time. Otherwise it
            limits the wait for each message.
    """

    evict_after_s: Mapping[Waiting, float]
    end_after_s: Mapping[Waiting, float]
    by_bytes: bool = False


class Place:
    """The place of one call. Its methods are called in the thread of that call, but for `end`.

    Attributes:
        peer: The connection of the call.
        limits: How long it may wait for its client.
        waiting: What it waits for.
        since: Since when it waits, by the monotonic clock.
        waited_s: Seconds that it has waited in all, less those that progress has added; 0 unless `limits.by_bytes`.
    """

    __slots__ = ("_by_bytes", "_end", "limits", "peer", "since", "waited_s", "waiting")

    def __init__(self, peer: str, end: Callable[[str], object], limits: WaitLimits) -> None:
        self.peer = peer
        self.limits = limits
        self._end = end
        self._by_bytes = limits.by_bytes
        self.since = time.monotonic()
        self.waited_s = 0.0
        self.waiting = FIRST_MESSAGE

    def wait(self, waiting: Waiting) -> None:
        """Begin to wait for the client."""
        self.since = time.monotonic()
        self.waiting = waiting

    def resume(self) -> None:
        """The client has done what the call waited for."""
        if self._by_bytes and self.waiting is not FIRST_MESSAGE:
            self.waited_s += time.monotonic() - self.since
        self.waiting = NOTHING

    def record_progress(self, size: int) -> None:
        """Count bytes that were missing and have arrived, or that the client has taken."""
        self.waited_s = max(0.0, self.waited_s - size / MIN_BYTES_PER_S)

    def end(self, why: str) -> None:
        """End the call with a message for its client. Safe from any thread."""
        waited_s = time.monotonic() - self.since
        self.waiting = NOTHING
        self._end(f"The server has waited {waited_s:.1f} s for this call's client, and {why}.")

    def release(self) -> None:
        """Drop the reference to the call, which is over.

        The call's context variables refer to the place. The cycle would keep the call until a garbage collection, and
        gRPC would count it as an open stream of its connection.
        """
        self._end = _do_nothing


def _do_nothing(_why: str) -> None:
    pass


_current: ContextVar[Place] = ContextVar("place")


def current() -> Place | None:
    """The place of the call that runs in this thread; None outside a call."""
    return _current.get(None)


def record_progress(size: int) -> None:
    """Count progress of the call that runs in this thread, see `Place.record_progress`."""
    place = current()
    if place is not None:
        place.record_progress(size)


class Places:
    """The places of one kind of calls. Safe to use from several threads.

    Args:
        what: The kind and its state, for messages, such as "streams are open".
        limit: How many places there are.
        protected: The first so many of the calls that wait for their first message cannot be evicted before
            `end_after_s`. So slow clients finish, however many others come; the other places become free soon.
    """

    def __init__(self, what: str, limit: int, protected: int = 0) -> None:
        self._what = what
        self._limit = limit
        self._protected = protected
        self._lock = threading.Lock()
        self._taken: dict[Place, None] = {}
        self._peers: Counter[str] = Counter()

    @contextmanager
    def place(self, peer: str, end: Callable[[str], object], limits: WaitLimits) -> Iterator[Place]:
        """Take a place for the length of a with-block; `current` returns it there.

        Args:
            peer: The connection of the call.
            end: Ends the call with a message for its client.
            limits: How long the call may wait for its client.

        Raises:
            OptserveError: TOO_MANY_STREAMS.
        """
        place = Place(peer, end, limits)
        self._take(place)
        _current.set(place)
        try:
            yield place
        finally:
            with self._lock:
                self._remove(place)
            place.release()

    def _take(self, place: Place) -> None:
        with self._lock:
            evicted = None
            if len(self._taken) >= self._limit:
                evicted = self._choose_to_evict(place.peer)
                if evicted is None:
                    raise self.full_error()
                self._remove(evicted)
            self._taken[place] = None
            self._peers[place.peer] += 1
        if evicted is not None:
            evicted.end("another call needed its place; try again")

    def full_error(self) -> OptserveError:
        """The error for a newcomer if no call can be evicted."""
        return OptserveError(
            Reason.TOO_MANY_STREAMS,
            f"{self._limit} {self._what}, and this server takes no more; try again later.",
            limit=self._limit,
        )

    def _remove(self, place: Place) -> None:
        # An evicted call was removed before.
        if place in self._taken:
            del self._taken[place]
            self._peers[place.peer] -= 1
            if not self._peers[place.peer]:
                del self._peers[place.peer]

    def _choose_to_evict(self, newcomer: str) -> Place | None:
        """The call to evict: of the connection with the most places, the one that has waited longest; or None."""
        now, in_own_pool, protected = time.monotonic(), self._peers[newcomer] + 1, self._protected
        best, best_key = None, (0, 0.0)
        # The oldest first.
        for place in self._taken:
            key = (self._peers[place.peer], now - place.since)
            spared_s = place.limits.evict_after_s.get(place.waiting, math.inf)
            if place.waiting is FIRST_MESSAGE:
                if protected > 0:
                    protected -= 1
                    spared_s = place.limits.end_after_s.get(place.waiting, math.inf)
                if key[0] > in_own_pool:
                    # A connection with many places does not keep out one with few.
                    spared_s = 0.0
            if key[1] >= spared_s and key > best_key:
                best, best_key = place, key
        return best

    def end_longest_waiting(self, waited_s: float) -> int:
        """End the longest waiting half of the calls that have waited more than `waited_s`; returns how many."""
        now = time.monotonic()
        with self._lock:
            waiting = [place for place in self._taken if place.waiting is not NOTHING and now - place.since > waited_s]
        waiting.sort(key=lambda place: place.since)
        some = waiting[: -(-len(waiting) // 2)]
        for place in some:
            place.end("the server's memory is almost full; try again later")
        return len(some)

    def end_overdue(self) -> int:
        """End the calls that have waited longer than they may; returns how many."""
        now = time.monotonic()
        with self._lock:
            late = [
                place
                for place in self._taken
                if place.waited_s + now - place.since > place.limits.end_after_s.get(place.waiting, math.inf)
            ]
        for place in late:
            place.end("that is longer than it may take")
        return len(late)
