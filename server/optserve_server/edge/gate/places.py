"""The places of the calls of one kind: a bounded number, kept by sending and taking, not by being there.

A call has a thread while it has a place. Where all are taken, one whose client owes it something gives way to a
newcomer; where there is none, the newcomer is told to come back. And whoever waits too long for its client is ended.

gRPC does not tell how much of a message has come. So a call whose one message may be large is waited for as long as
that may take, where it is one of those that came first; the other places are for newcomers, see `lasting`.
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
"""A call that has waited for its message for less gives way only to connections that have fewer places.

Those who come when all wait are told to come back in a second.
"""

MIN_BYTES_PER_S = 64 << 10
"""What a client has to move, on average: in a transfer to keep its place, and in a call of one message to be heard."""


class Waiting(Enum):
    """What a call waits for."""

    NOTHING = auto()
    """From its client; the server is at work."""
    FIRST_MESSAGE = auto()
    NEXT_MESSAGE = auto()
    TAKING = auto()
    """That the client takes a message."""


# Python finds a member in its Enum in 80 ns, and each message of a stream has four of them to look at.
NOTHING, FIRST_MESSAGE, NEXT_MESSAGE, TAKING = Waiting


@dataclass(frozen=True)
class Patience:
    """How long calls of one kind may wait for their clients, in seconds, by what they wait for.

    Attributes:
        gives_way_s: After so long it gives way to a newcomer that needs the place; what is not named never does.
        ends_s: After so long it is ended; what is not named never is.
        by_bytes: `ends_s` is what it may wait in all, and each byte that was missing buys more; otherwise what it may
            wait for each message.
    """

    gives_way_s: Mapping[Waiting, float]
    ends_s: Mapping[Waiting, float]
    by_bytes: bool = False


class Place:
    """That of one call, in whose thread it is used.

    Attributes:
        peer: The connection that the call came by.
        patience: With its client.
        waiting: What it waits for.
        since: From when on, by the monotonic clock.
        waited_s: For how long in all, less what was bought, where that counts.
    """

    __slots__ = ("_by_bytes", "_end", "patience", "peer", "since", "waited_s", "waiting")

    def __init__(self, peer: str, end: Callable[[str], object], patience: Patience) -> None:
        self.peer = peer
        self.patience = patience
        self._end = end
        self._by_bytes = patience.by_bytes
        self.since = time.monotonic()
        self.waited_s = 0.0
        self.waiting = FIRST_MESSAGE

    def wait(self, waiting: Waiting) -> None:
        """Begin to wait for the client."""
        self.since = time.monotonic()
        self.waiting = waiting

    def go_on(self) -> None:
        """The client has done what was waited for."""
        if self._by_bytes and self.waiting is not FIRST_MESSAGE:
            self.waited_s += time.monotonic() - self.since
        self.waiting = NOTHING

    def moved(self, size: int) -> None:
        """So many bytes that were missing have come, or have been taken."""
        self.waited_s = max(0.0, self.waited_s - size / MIN_BYTES_PER_S)

    def end(self, why: str) -> None:
        """End the call, from any thread, and tell its client why."""
        waited_s = time.monotonic() - self.since
        self.waiting = NOTHING
        self._end(f"The server has waited {waited_s:.1f} s for this call's client, and {why}.")

    def left(self) -> None:
        """The call is over, and must not be kept by its place.

        The call's own context variables have the place: a cycle of what gRPC counts as a stream of its connection, of
        which it refuses to have more than a limit, and which only the garbage collector would find.
        """
        self._end = _nothing


def _nothing(_why: str) -> None:
    pass


_current: ContextVar[Place] = ContextVar("place")


def current() -> Place | None:
    """The place of the present call, if it has one."""
    return _current.get(None)


def progress(size: int) -> None:
    """The present call, if it has a place, has moved so many bytes that were missing."""
    place = current()
    if place is not None:
        place.moved(size)


class Places:
    """The places of one kind. Safe to use from several threads.

    Args:
        what: The kind and what it does, for messages, as "streams are open".
        limit: Most of them.
        lasting: Of the calls that wait for their first messages, so many, those that came first, are spared for as long
            as they may wait, and not for `gives_way_s` only. So slow clients come to an end however many others there
            are; and the places beyond are soon free for a newcomer.
    """

    def __init__(self, what: str, limit: int, lasting: int = 0) -> None:
        self._what = what
        self._limit = limit
        self._lasting = lasting
        self._lock = threading.Lock()
        self._taken: dict[Place, None] = {}
        self._peers: Counter[str] = Counter()

    @contextmanager
    def place(self, peer: str, end: Callable[[str], object], patience: Patience) -> Iterator[Place]:
        """A place for the length of a with-block, in which it is that of the present call.

        Args:
            peer: The connection that the call came by.
            end: Ends the call, should it have to go, and tells its client why.
            patience: With its client.

        Raises:
            OptserveError: TOO_MANY_STREAMS.
        """
        place = Place(peer, end, patience)
        self._take(place)
        _current.set(place)
        try:
            yield place
        finally:
            with self._lock:
                self._remove(place)
            place.left()

    def _take(self, place: Place) -> None:
        with self._lock:
            leaver = None
            if len(self._taken) >= self._limit:
                leaver = self._one_that_gives_way(place.peer)
                if leaver is None:
                    raise self.full()
                self._remove(leaver)
            self._taken[place] = None
            self._peers[place.peer] += 1
        if leaver is not None:
            leaver.end("another one needed its place; try again")

    def full(self) -> OptserveError:
        """What newcomers are told where nobody gives way."""
        return OptserveError(
            Reason.TOO_MANY_STREAMS,
            f"{self._limit} {self._what}, which is all that this server takes; try again later.",
            limit=self._limit,
        )

    def _remove(self, place: Place) -> None:
        # One that had to give way has left already.
        if place in self._taken:
            del self._taken[place]
            self._peers[place.peer] -= 1
            if not self._peers[place.peer]:
                del self._peers[place.peer]

    def _one_that_gives_way(self, newcomer: str) -> Place | None:
        """Of those who have waited long enough, one of the connection that has the most places, the longest first."""
        now, own, lasting = time.monotonic(), self._peers[newcomer] + 1, self._lasting
        best, best_key = None, (0, 0.0)
        # In the order in which they came.
        for place in self._taken:
            key = (self._peers[place.peer], now - place.since)
            spared_s = place.patience.gives_way_s.get(place.waiting, math.inf)
            if place.waiting is FIRST_MESSAGE:
                if lasting > 0:
                    lasting -= 1
                    spared_s = place.patience.ends_s.get(place.waiting, math.inf)
                if key[0] > own:
                    # Whoever has many places does not keep out those who have few.
                    spared_s = 0.0
            if key[1] >= spared_s and key > best_key:
                best, best_key = place, key
        return best

    def end_some_who_wait(self, waited_s: float) -> int:
        """End the half that has waited longest for their clients, of those who have for so long; gives how many."""
        now = time.monotonic()
        with self._lock:
            waiting = [place for place in self._taken if place.waiting is not NOTHING and now - place.since > waited_s]
        waiting.sort(key=lambda place: place.since)
        some = waiting[: -(-len(waiting) // 2)]
        for place in some:
            place.end("its memory is almost used up; try again later")
        return len(some)

    def end_those_who_wait_too_long(self) -> int:
        """Look after all; gives how many were ended."""
        now = time.monotonic()
        with self._lock:
            late = [
                place
                for place in self._taken
                if place.waited_s + now - place.since > place.patience.ends_s.get(place.waiting, math.inf)
            ]
        for place in late:
            place.end("that is longer than it may take")
        return len(late)
