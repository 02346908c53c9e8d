"""Ends waiting calls when memory is almost full: they may hold incomplete messages, which gRPC does not report.

If ending calls frees no memory, it waits longer before it ends more.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from optserve_server.edge.gate.places import Places

logger = logging.getLogger(__name__)

FULL = 0.95
"""Part of `memory_bytes` beyond which calls that wait for their clients are ended."""

WAITED_S = 1.0
"""Calls that have waited for less are not ended, unless more than `memory_bytes` is used: then what arrives in a second
would come on top."""

NOTICED, NOTICED_BYTES = 0.005, 1 << 20
"""A smaller change than this part of `memory_bytes`, or than these bytes, counts as none."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""Seconds to wait after ending calls has freed nothing; they double each time."""


class Relief:
    """Keeps the memory of this process below FULL by ending calls that wait for their clients.

    Args:
        memory_bytes: Memory that the process may use.
        places: The places of the calls.
        own_bytes: Returns the memory that the process uses.
        trim: Gives freed memory back to the system; called before calls are ended.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        memory_bytes: int,
        places: Sequence[Places],
        own_bytes: Callable[[], int],
        trim: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory_bytes = memory_bytes
        self._full_bytes = FULL * memory_bytes
        self._noticed_bytes = max(NOTICED * memory_bytes, NOTICED_BYTES)
        self._places = places
        self._own_bytes = own_bytes
        self._trim = trim
        # A trim goes through all freed memory, so it is not made at every check.
        self._trim_at = -math.inf
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        # The most memory that was used when calls were ended; 0 once that has helped.
        self._most_bytes = 0
        self._pause_s = FIRST_PAUSE_S
        self._next_at = 0.0

    def check(self) -> int:
        """End half of the waiting calls if memory is full; returns how many.

        Does nothing if the last time has freed no memory, memory has not grown since, and the pause is not over.
        """
        used = self._own_bytes()
        if used <= self._full_bytes - (self._noticed_bytes if self._most_bytes else 0):
            self._reset()
            return 0
        if used <= self._full_bytes:
            return 0
        now = self._clock()
        if self._most_bytes and used < self._most_bytes - self._noticed_bytes:
            self._reset()
        elif self._most_bytes and used < self._most_bytes + self._noticed_bytes and now < self._next_at:
            return 0
        return self._end_calls(used, now)

    def _end_calls(self, used: int, now: float) -> int:
        if now >= self._trim_at:
            self._trim_at = now + FIRST_PAUSE_S
            self._trim()
            used = self._own_bytes()
            if used <= self._full_bytes:
                return 0
        waited_s = WAITED_S if used <= self._memory_bytes else 0.0
        ended = sum(places.end_longest_waiting(waited_s) for places in self._places)
        if not ended:
            return 0
        first = not self._most_bytes
        self._most_bytes = max(self._most_bytes, used)
        self._next_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if first:
            logger.warning(
                "more than %.0f %% of memory_bytes are used: %d calls that waited for their clients were ended; if "
                "that frees nothing, others follow after %g s and longer pauses",
                100 * FULL, ended, self._next_at - now,
            )  # fmt: skip
        return ended
