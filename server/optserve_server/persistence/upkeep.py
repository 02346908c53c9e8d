"""Decides when the next snapshot is due, and knows why changes cannot be made durable at the moment."""

from __future__ import annotations

import logging

from optserve._common.clock import SYSTEM, Clock

logger = logging.getLogger(__name__)

WARN_EVERY_S = 60.0
MAX_PAUSE_S = 60.0
"""Longest pause between two snapshots that fail, or that are taken because the disk refuses changes."""
_TIMES_ITS_LENGTH = 10
"""After a snapshot that was taken because the disk refuses changes, pause for this many times its duration."""


class Upkeep:
    """Safe to use from several threads.

    Args:
        clock: The time.
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._monotonic = clock.monotonic
        self._lock = clock.lock()
        # Why the disk refuses changes, and how many it has refused; why no snapshot can be written.
        self._refusal = ""
        self._refused = 0
        self._failure = ""
        self._failures = 0
        self._pause_until = self._pause_when_refused_until = self._warned_at = -float("inf")

    @property
    def problem(self) -> str:
        """Why changes cannot be made durable, in words; empty if they can."""
        return self._refusal or self._failure

    def refused(self, error: OSError) -> None:
        """The disk did not take a change, which was refused."""
        with self._lock:
            self._refused += 1
            self._refusal = f"the disk refuses changes: {error.strerror or error}"
            now = self._monotonic()
            if now - self._warned_at < WARN_EVERY_S:
                return
            self._warned_at = now
        logger.warning("%s. The server tries to write a snapshot, which lets it delete journal files", self._refusal)

    def accepted(self) -> None:
        """A change is durable."""
        if not self._refusal:
            return
        with self._lock:
            refused, self._refusal, self._refused, self._warned_at = self._refused, "", 0, -float("inf")
        logger.warning("the disk accepts changes now; %d were refused before", refused)

    def is_snapshot_due(self, *, grown: bool) -> bool:
        """Whether to write one now.

        Args:
            grown: Whether the journal has grown by as much as it may. Where the disk refuses changes, one is written
                before that, since it is what makes room; and where the last one has failed, since nobody could tell
                otherwise that the disk takes it again.
        """
        now = self._monotonic()
        with self._lock:
            if now < self._pause_until:
                return False
            return grown or self._failures > 0 or (self._refused > 0 and now >= self._pause_when_refused_until)

    def snapshot_made(self, name: str, seconds: float) -> None:
        """A snapshot of that name was written, in so many seconds."""
        with self._lock:
            failures, self._failure, self._failures = self._failures, "", 0
            self._pause_when_refused_until = self._monotonic() + min(_TIMES_ITS_LENGTH * seconds, MAX_PAUSE_S)
        # Whoever has read of the failures wants to read of their end; the others come every second or two.
        level = logging.WARNING if failures else logging.DEBUG
        logger.log(level, "snapshot %s was written%s", name, f"; {failures} before it had failed" if failures else "")
        # There is room again where the journal was.
        self.accepted()

    def snapshot_failed(self, error: Exception) -> None:
        """It could not be written, and is tried again after a pause that becomes longer."""
        with self._lock:
            pause_s = min(2.0**self._failures, MAX_PAUSE_S)
            self._failures += 1
            self._pause_until = self._monotonic() + pause_s
            self._failure = f"snapshots cannot be written: {error}"
        if isinstance(error, OSError):
            logger.warning("a snapshot could not be written (%s); it is tried again in %.0f s", error, pause_s)
        else:
            logger.error("a snapshot could not be written; it is tried again in %.0f s", pause_s, exc_info=error)
