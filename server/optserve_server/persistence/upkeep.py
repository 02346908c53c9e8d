"""Decides when the next snapshot is due, and knows why changes cannot be made durable now."""

from __future__ import annotations

import logging

from optserve._common.clock import SYSTEM, Clock

logger = logging.getLogger(__name__)

WARN_EVERY_S = 60.0
MAX_PAUSE_S = 60.0
"""Longest pause after a snapshot that has failed, or that was written because the disk refuses changes."""
_PAUSE_PER_DURATION = 10
"""After a snapshot that was written because the disk refuses changes, pause for this many times its duration."""


class Upkeep:
    """The schedule of snapshots, and the failures of the disk. Safe to use from several threads.

    Args:
        clock: The time.
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._monotonic = clock.monotonic
        self._lock = clock.lock()
        # Why the disk refuses changes, and how many it has refused; why snapshots fail, and how many have failed.
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
        """Note that the disk has refused a change."""
        with self._lock:
            self._refused += 1
            self._refusal = f"the disk refuses changes: {error.strerror or error}"
            now = self._monotonic()
            if now - self._warned_at < WARN_EVERY_S:
                return
            self._warned_at = now
        logger.warning("%s. The server tries to write a snapshot, which lets it delete journal files", self._refusal)

    def accepted(self) -> None:
        """Note that the disk has accepted a change."""
        if not self._refusal:
            return
        with self._lock:
            refused, self._refusal, self._refused, self._warned_at = self._refused, "", 0, -float("inf")
        logger.warning("the disk accepts changes now; %d were refused before", refused)

    def is_snapshot_due(self, *, grown: bool) -> bool:
        """Whether to write a snapshot now.

        A snapshot is due when the journal has grown enough. It is due earlier if the disk refuses changes, because it
        lets the server delete journal segments, which frees disk space. It is also due earlier if the last snapshot has
        failed, because only a new one shows whether the disk accepts snapshots again.

        Args:
            grown: Whether the journal has grown enough.
        """
        now = self._monotonic()
        with self._lock:
            if now < self._pause_until:
                return False
            return grown or self._failures > 0 or (self._refused > 0 and now >= self._pause_when_refused_until)

    def snapshot_written(self, name: str, seconds: float) -> None:
        """Note that a snapshot was written.

        Args:
            name: Name of the snapshot.
            seconds: How long it took.
        """
        with self._lock:
            failures, self._failure, self._failures = self._failures, "", 0
            self._pause_when_refused_until = self._monotonic() + min(_PAUSE_PER_DURATION * seconds, MAX_PAUSE_S)
        # The end of failures is a warning, as they were. Other snapshots may come every second, so they are not.
        level = logging.WARNING if failures else logging.DEBUG
        logger.log(level, "snapshot %s was written%s", name, f"; {failures} before it had failed" if failures else "")
        # The snapshot has let the server delete journal segments, so there is disk space.
        self.accepted()

    def snapshot_failed(self, error: Exception) -> None:
        """Note that a snapshot has failed. The next one is due after a pause that doubles with each failure."""
        with self._lock:
            pause_s = min(2.0**self._failures, MAX_PAUSE_S)
            self._failures += 1
            self._pause_until = self._monotonic() + pause_s
            self._failure = f"snapshots cannot be written: {error}"
        if isinstance(error, OSError):
            logger.warning("a snapshot could not be written (%s); it is tried again in %.0f s", error, pause_s)
        else:
            logger.error("a snapshot could not be written; it is tried again in %.0f s", pause_s, exc_info=error)
