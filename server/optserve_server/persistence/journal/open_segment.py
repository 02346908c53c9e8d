"""The segment to which the journal writes its records."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from optserve_server.persistence.disk import Buffer, Disk
from optserve_server.persistence.files import write_all
from optserve_server.persistence.journal.format import (
    MARK,
    MAX_ATTEMPTS,
    SEGMENT_HEADER,
    RecordFormat,
    attempt_of,
    first_lsn_of,
    padding,
    segment_paths,
)
from optserve_server.persistence.journal.newest import note_newest_segment, noted_segment

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 16


class OpenSegment:
    """A new segment, open for writing. Not safe to use from several threads.

    Args:
        folder: The folder of the journal.
        first_lsn: LSN of the first record.
        size_bytes: Size of the file. A larger first record makes the file larger.
        disk: The disk of the folder.

    Attributes:
        path: Its file.
        format: The format of its records.
        end: Byte after the last record.

    Raises:
        OSError: The disk refuses the segment. No file of it is left, unless the disk refuses to remove it.
    """

    def __init__(self, folder: Path, first_lsn: int, size_bytes: int, disk: Disk) -> None:
        self._capacity = size_bytes
        self._disk = disk
        self.format = RecordFormat.with_random_key()
        attempt = 1 + max(
            (attempt_of(path) for path in segment_paths(folder) if first_lsn_of(path) == first_lsn), default=0
        )
        if attempt > MAX_ATTEMPTS:
            raise OSError(
                f"{MAX_ATTEMPTS} files of the journal begin at record {first_lsn}; writing to each of them has failed"
            )
        self.path = folder / f"{first_lsn:020d}-{attempt:04d}.journal"
        # Written under another name first, so that no reader finds a segment without its header.
        temporary = self.path.with_suffix(".tmp")
        self._descriptor = disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            disk.allocate(self._descriptor, size_bytes)
            write_all(self._descriptor, [self.format.encode_segment_header(first_lsn)], 0, disk)
            disk.sync(self._descriptor)
            disk.rename(temporary, self.path)
            disk.sync_path(folder)
            note_newest_segment(folder, self.path, disk)
        except OSError:
            disk.close(self._descriptor)
            disk.unlink(temporary, missing_ok=True)
            if noted_segment(folder) != self.path.name:
                disk.unlink(self.path, missing_ok=True)
            raise
        self.end = SEGMENT_HEADER.size
        # The size to which the disk has refused to truncate the file; None if it has not refused.
        self._pending_truncation: int | None = None

    @property
    def has_refused_records(self) -> bool:
        """Whether bytes of a record that was refused are still in the file, because the disk refused to truncate it."""
        return self._pending_truncation is not None

    def is_too_full_for(self, record_bytes: int) -> bool:
        """Whether a record of that size belongs into a new segment. An empty segment takes a record of any size."""
        return self.end > SEGMENT_HEADER.size and self.end + record_bytes > self._capacity

    def write(self, parts: list[Buffer]) -> int:
        """Write a record after the last one, and return its size in bytes.

        Raises:
            OSError: The segment does not contain the record. See `truncate` for the bytes that were written.
        """
        size = sum(len(part) for part in parts)
        self.remove_refused()
        try:
            write_all(self._descriptor, [*parts, bytes(padding(size))], self.end, self._disk)
        except OSError:
            # A part of the record may have been written, which a reader would report as a torn tail.
            self.truncate(self.end)
            raise
        size += padding(size)
        self.end += size
        return size

    def write_mark(self, durable_lsn: int) -> int:
        """Write a mark that says what is durable, and return its size in bytes.

        The mark is not synced, and an error is only logged: the journal is correct without it.
        """
        try:
            return self.write([self.format.encode_header(MARK, 0, durable_lsn, b"", 0, 0)])
        except OSError as error:
            logger.warning("the journal's mark could not be written: %s", error)
            return 0

    def sync(self) -> None:
        """Wait until all records are on disk.

        Raises:
            OSError: They are not, or the file was deleted, so that no start will find it.
        """
        self._disk.sync_data(self._descriptor)
        if _is_deleted(self._descriptor):
            raise _deleted_error(self.path)

    def check_in_place(self) -> None:
        """Raise OSError if the file is no longer at its path."""
        if not self.path.exists():
            raise _deleted_error(self.path)

    def truncate(self, size_bytes: int, *, durably: bool = False) -> None:
        """Remove everything from a byte on.

        If the disk refuses that, the segment accepts no record until `remove_refused` has succeeded.

        Args:
            size_bytes: The size that is left.
            durably: See `remove_refused`.
        """
        self._pending_truncation = size_bytes
        try:
            self.remove_refused(durably=durably)
        except OSError as error:
            logger.warning("%s: the end could not be truncated: %s", self.path, error)

    def remove_refused(self, *, durably: bool = False) -> None:
        """Truncate the file if the disk has refused to do so before.

        Args:
            durably: Wait until the truncation is on disk. Do not use it while records of other threads wait for their
                sync: if the sync failed here, their own sync could succeed without having written them.

        Raises:
            OSError: The disk refuses. The bytes of the refused record are still in the file.
        """
        if self._pending_truncation is not None:
            self._disk.truncate(self._descriptor, self._pending_truncation)
            if durably:
                self._disk.sync(self._descriptor)
            self._pending_truncation = None

    def close(self) -> None:
        """Close the file."""
        self._disk.close(self._descriptor)


def rewrite_segment(path: Path, disk: Disk) -> None:
    """Make a segment durable that another process has written.

    A sync alone is not enough. If a sync failed in that process, the system keeps the unwritten pages in its cache and
    takes them for written, so the next sync does nothing. Therefore this function writes the content once more.

    Raises:
        OSError: The disk refuses.
    """
    descriptor = disk.open(path, os.O_RDWR)
    try:
        try:
            _rewrite(descriptor, disk)
        except OSError as error:
            # A file system that never writes in place needs free space for it, on the disk and in a quota. A start must
            # succeed without free space.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning("%s cannot be written once more, because the disk is full; it is synced only", path)
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def _rewrite(descriptor: int, disk: Disk) -> None:
    position = 0
    while block := os.pread(descriptor, _BLOCK_BYTES, position):
        # The preallocated end, which no record was written to, stays as it is.
        if block.strip(b"\0"):
            write_all(descriptor, [block], position, disk)
        position += len(block)


def _is_deleted(descriptor: int) -> bool:
    """Whether an open file has no name any more.

    fstat would say so too. But since Linux 6.13, after a call of fstat the next write updates the file's time, and the
    next sync has to write that time to the disk: write and sync then take half as long again.
    """
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith(" (deleted)")  # noqa: PTH115 - a Path takes 5 µs more
    except OSError:
        return os.fstat(descriptor).st_nlink == 0


def _deleted_error(path: Path) -> OSError:
    return FileNotFoundError(errno.ENOENT, "the journal was deleted", str(path))
