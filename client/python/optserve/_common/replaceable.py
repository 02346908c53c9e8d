"""Files that may be replaced while a process runs, and that are read anew then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from optserve._common.clock import Clock

_T = TypeVar("_T")

RETRY_S = 1.0
"""Seconds after which files that could not be used are read once more: the rights of a file, or the time, may be what
has changed since."""


class Replaceable(Generic[_T]):
    """What is in some files, which belong together.

    Safe from any thread. While one thread reads the files, others go on with the present content.

    Args:
        files: Their paths. A link counts as the file that it leads to.
        read: Reads and checks all of them; raises ValueError if they cannot be used.
        what: What they are, in words, for the log.
        logger: The log.
        clock: The time.

    Attributes:
        content: What was last read from files that could be used.

    Raises:
        ValueError: See `read`.
    """

    def __init__(
        self, files: Sequence[Path], read: Callable[[], _T], what: str, logger: logging.Logger, clock: Clock
    ) -> None:
        self._files = tuple(files)
        self._read = read
        self._what = what
        self._logger = logger
        self._clock = clock
        self._lock = clock.lock()
        # Before they are read, so that a change while they are read is noticed.
        self._used = self._tried = self._identity()
        self._tried_at = 0.0
        self._logged: object = None
        self.content = read()

    def renew(self) -> _T | None:
        """The new content if the files have changed and can be used; None to go on with the present one.

        Files that cannot be used are a warning, once for each change.
        """
        if not self._lock.acquire(blocking=False):
            # Another thread reads them, and a file system may take its time.
            return None
        try:
            return self._renew()
        finally:
            self._lock.release()

    def _renew(self) -> _T | None:
        present = self._identity()
        now = self._clock.monotonic()
        if present == self._used or (present == self._tried and now - self._tried_at < RETRY_S):
            return None
        self._tried, self._tried_at = present, now
        try:
            self.content = self._read()
        except ValueError as error:
            # As text: who keeps an entry of the log would keep the frames of the call that is about to begin.
            message = str(error)
            if self._logged != (present, message):
                self._logged = present, message
                self._logger.warning("the new %s is not used; the one before stays in use: %s", self._what, message)
            return None
        self._used = present
        return self.content

    def _identity(self) -> tuple[tuple[int, int, int], ...]:
        """What differs after a file was written or replaced."""
        return tuple(_identity(path) for path in self._files)


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)
