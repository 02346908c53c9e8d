"""Which errors are retryable, and how long to wait before a retry."""

from __future__ import annotations

import logging
import random

from optserve._common.clock import SYSTEM, Clock
from optserve._rpc.channel import RECONNECT_PAUSE_S
from optserve.config import ClientConfig
from optserve.errors import OptserveError, UnavailableError

logger = logging.getLogger(__name__)

WARN_AFTER_S, WARN_EVERY_S = 2.0, 30.0
"""Seconds after which a warning says why a call is still being retried, and seconds between later warnings."""


class Backoff:
    """The pauses between the tries of one call. They double, have jitter, and are at least what the server asks for.

    While no server answers they are at most RECONNECT_PAUSE_S. A warning in the log says what a long call waits for.
    """

    def __init__(self, config: ClientConfig, clock: Clock = SYSTEM) -> None:
        self._monotonic = clock.monotonic
        self._pause_s = config.initial_backoff_s
        self._max_pause_s = config.max_backoff_s
        self._began = self._monotonic()
        self._warn_at = self._began + WARN_AFTER_S

    def next_pause_s(self, error: OptserveError) -> float:
        """Seconds to wait before the next try, after `error`."""
        now = self._monotonic()
        if now >= self._warn_at and is_retryable(error):
            logger.warning("still trying after %.0f s: %s", now - self._began, error)
            self._warn_at = now + WARN_EVERY_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, self._max_pause_s)
        # Without a reason, the error does not come from a server: none was reached.
        if isinstance(error, UnavailableError) and not error.reason:
            pause_s = min(pause_s, RECONNECT_PAUSE_S)
        return max(pause_s, error.retry_after_s or 0.0) * random.uniform(0.75, 1.25)  # noqa: S311 - no secret


def is_retryable(error: OptserveError) -> bool:
    """Whether the same call is worth another try."""
    return isinstance(error, UnavailableError) or error.retry_after_s is not None
