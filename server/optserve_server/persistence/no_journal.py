"""The replacement of the journal with durability `snapshot`, which has no journal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optserve._common.clock import Clock
from optserve_server.persistence.disk import Disk
from optserve_server.persistence.journal import note_newest_segment, segment_paths


class NoJournal:
    """Gives each change an LSN and writes nothing. Safe to use from several threads.

    Args:
        folder: The data folder.
        next_lsn: LSN of the first change.
        clock: The time.
        disk: The disk of the folder.

    Attributes:
        last_lsn: LSN of the last change.
        bytes_written: Always 0.
    """

    def __init__(self, folder: Path, next_lsn: int, clock: Clock, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk
        self._lock = clock.lock()
        self.last_lsn = next_lsn - 1
        self.bytes_written = 0

    def append(self, kind: int, meta: bytes, payload: Sequence[memoryview] = ()) -> int:  # noqa: ARG002 - see Journal
        """Return the LSN of a change."""
        with self._lock:
            self.last_lsn += 1
            return self.last_lsn

    def delete_before(self, lsn: int) -> None:  # noqa: ARG002
        """Delete the journal of an earlier server with durability `journal`. Its changes are in the snapshot."""
        if paths := segment_paths(self._folder):
            note_newest_segment(self._folder, None, self._disk)
            for path in paths:
                self._disk.unlink(path)

    def remove_refused(self) -> None:
        """Nothing is written, so nothing is refused."""

    def close(self) -> None:
        """Nothing to close."""
