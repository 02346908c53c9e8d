"""The segment of the journal that is being written."""

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
    SEGMENT,
    Form,
    attempt_of,
    first_lsn_of,
    padding,
    segment_paths,
)
from optserve_server.persistence.journal.newest import newest_name, set_newest

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 16


class OpenSegment:
    """The segment that is being written. Not safe to use from several threads.

    Attributes:
        path: Its file.
        form: Of its records.
        end: Byte behind the last record.
    """

    def __init__(self, folder: Path, first_lsn: int, size_bytes: int, disk: Disk) -> None:
        self._capacity = size_bytes
        self._disk = disk
        self.form = Form.drawn()
        attempt = 1 + max(
            (attempt_of(path) for path in segment_paths(folder) if first_lsn_of(path) == first_lsn), default=0
        )
        if attempt > MAX_ATTEMPTS:
            raise OSError(f"{MAX_ATTEMPTS} files of the journal begin at record {first_lsn}, each left for its errors")
        self.path = folder / f"{first_lsn:020d}-{attempt:04d}.journal"
        # Made under another name, so that a segment without its header is never seen.
        temporary = self.path.with_suffix(".tmp")
        self._descriptor = disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            disk.allocate(self._descriptor, size_bytes)
            write_all(self._descriptor, [self.form.segment_header(first_lsn)], 0, disk)
            disk.sync(self._descriptor)
            disk.rename(temporary, self.path)
            disk.sync_path(folder)
            set_newest(folder, self.path, disk)
        except OSError:
            disk.close(self._descriptor)
            disk.unlink(temporary, missing_ok=True)
            if newest_name(folder) != self.path.name:
                disk.unlink(self.path, missing_ok=True)
            raise
        self.end = SEGMENT.size
        # Where the file should have been cut, and could not be.
        self._cut_at: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether nothing that was refused is left in it."""
        return self._cut_at is None

    def is_too_full_for(self, record_bytes: int) -> bool:
        """Whether a record of that size belongs into a new segment."""
        return self.end > SEGMENT.size and self.end + record_bytes > self._capacity

    def write(self, parts: list[Buffer]) -> int:
        """Write a record behind the last and return its bytes, or raise OSError: nothing that counts was written."""
        size = sum(len(part) for part in parts)
        self.cut()
        try:
            write_all(self._descriptor, [*parts, bytes(padding(size))], self.end, self._disk)
        except OSError:
            # A part of a record is no record; zeros instead keep it from being taken for a torn one.
            self.take_back(self.end)
            raise
        size += padding(size)
        self.end += size
        return size

    def mark(self, durable_lsn: int) -> int:
        """Note what is durable, and return the note's bytes. Not synced: worth having, and no loss if it is lost."""
        try:
            return self.write([self.form.header(MARK, 0, durable_lsn, b"", 0, 0)])
        except OSError as error:
            logger.warning("the journal's mark could not be written: %s", error)
            return 0

    def sync(self) -> None:
        """Wait until the disk has it.

        Raises:
            OSError: It has it not, or in a file that nobody will find.
        """
        self._disk.sync_data(self._descriptor)
        if _is_nameless(self._descriptor):
            raise _deleted(self.path)

    def check_found(self) -> None:
        """Raise OSError if the file is no longer where it was."""
        if not self.path.exists():
            raise _deleted(self.path)

    def take_back(self, position: int, *, durably: bool = False) -> None:
        """Remove what was written behind a position. If the disk refuses that, nothing is written before `cut` can."""
        self._cut_at = position
        try:
            self.cut(durably=durably)
        except OSError as error:
            logger.warning("%s: the end could not be cut: %s", self.path, error)

    def cut(self, *, durably: bool = False) -> None:
        """Remove what was to be taken back and is still there, if anything is.

        Args:
            durably: Wait until the disk has it; not where others still have something to be synced, whose failure would
                be told here and not there.

        Raises:
            OSError: It is still there.
        """
        if self._cut_at is not None:
            self._disk.truncate(self._descriptor, self._cut_at)
            if durably:
                self._disk.sync(self._descriptor)
            self._cut_at = None

    def close(self) -> None:
        """Close the file."""
        self._disk.close(self._descriptor)


def write_anew(path: Path, disk: Disk) -> None:
    """Make a segment durable that another process has written.

    A sync alone would not do: where one has failed in that process, the system keeps what it could not write in its
    cache, takes it for written, and the next sync has nothing to do. So what is there is written once more.

    Raises:
        OSError: The disk does not take it.
    """
    descriptor = disk.open(path, os.O_RDWR)
    try:
        try:
            _rewrite(descriptor, disk)
        except OSError as error:
            # A file system that never writes in place needs room for it, on the disk and in a quota; a start must not.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning("%s cannot be written once more, as the disk is full, and is synced only", path)
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def _rewrite(descriptor: int, disk: Disk) -> None:
    position = 0
    while block := os.pread(descriptor, _BLOCK_BYTES, position):
        # What was never written, at the end, stays so.
        if block.strip(b"\0"):
            write_all(descriptor, [block], position, disk)
        position += len(block)


def _is_nameless(descriptor: int) -> bool:
    """Whether an open file has no name in its folder any more.

    A call of stat would tell it as well. But since Linux 6.13 whoever looks at the times of a file makes the next write
    note a new one, which the next sync has to bring to the disk: each takes half as long again.
    """
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith(" (deleted)")  # noqa: PTH115 - a Path takes 5 µs more
    except OSError:
        return os.fstat(descriptor).st_nlink == 0


def _deleted(path: Path) -> OSError:
    return FileNotFoundError(errno.ENOENT, "the journal was deleted", str(path))
