"""Ends calls where memory runs out, as they may hold messages that are not complete, of which nobody knows.

What else takes memory is none of its business: where ending calls does not help, it does so ever more rarely.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from optserve_server.edge.gate.places import Places

logger = logging.getLogger(__name__)

FULL = 0.95
"""Of `memory_bytes`: beyond that, calls that wait for their clients are ended."""

WAITED_S = 1.0
"""Those that have waited for less are spared."""

NOTICED, NOTICED_BYTES = 0.005, 1 << 20
"""A part of `memory_bytes`, and bytes: less than either is no change."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""How long it waits where ending calls has not helped; each time twice as long as before."""


class Relief:
    """Keeps the memory of this process within limits, as far as that is up to calls that wait for their clients.

    Args:
        memory_bytes: What the process may use.
        places: Those of the calls.
        own_bytes: Tells what it uses.
        trim: Lets the allocator give back what is freed, before anybody is ended for it.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        memory_bytes: int,
        places: Sequence[Places],
        own_bytes: Callable[[], int],
        trim: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._full_bytes = FULL * memory_bytes
        self._noticed_bytes = max(NOTICED * memory_bytes, NOTICED_BYTES)
        self._places = places
        self._own_bytes = own_bytes
        self._trim = trim
        # It goes through all freed memory, so not at every look.
        self._trim_at = -math.inf
        self._clock = clock
        self._forget()

    def _forget(self) -> None:
        # The most that was used when calls were ended, while that has not helped.
        self._most_bytes = 0
        self._pause_s = FIRST_PAUSE_S
        self._next_at = 0.0

    def look(self) -> int:
        """End half of the calls that wait, if memory is full and that can help; gives how many were ended.

        It can help where the last time has helped; where memory has grown since, as somebody fills it; and where the
        last time is long ago.
        """
        used = self._own_bytes()
        if used <= self._full_bytes - (self._noticed_bytes if self._most_bytes else 0):
            self._forget()
            return 0
        if used <= self._full_bytes:
            return 0
        now = self._clock()
        if self._most_bytes and used < self._most_bytes - self._noticed_bytes:
            self._forget()
        elif self._most_bytes and used < self._most_bytes + self._noticed_bytes and now < self._next_at:
            return 0
        return self._end_some(used, now)

    def _end_some(self, used: int, now: float) -> int:
        if now >= self._trim_at:
            self._trim_at = now + FIRST_PAUSE_S
            self._trim()
            if self._own_bytes() <= self._full_bytes:
                return 0
        ended = sum(places.end_some_who_wait(WAITED_S) for places in self._places)
        if not ended:
            return 0
        first = not self._most_bytes
        self._most_bytes = max(self._most_bytes, used)
        self._next_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if first:
            logger.warning(
                "more than %.0f %% of memory_bytes are taken: %d calls that waited for their clients were ended; where "
                "that does not help, others follow after %g s and ever longer pauses",
                100 * FULL, ended, self._next_at - now,
            )  # fmt: skip
        return ended
