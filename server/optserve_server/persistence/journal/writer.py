"""The writing end: records to disk, several threads sharing a sync."""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from optserve._common.clock import SYSTEM, Clock
from optserve_server.persistence.files import write_all
from optserve_server.persistence.journal.format import (
    MARK,
    MAX_ATTEMPTS,
    RECORD,
    SEGMENT,
    Buffer,
    ClosedError,
    Form,
    attempt_of,
    first_lsn_of,
    padding,
    segment_paths,
    sync_file,
    sync_folder,
)
from optserve_server.persistence.journal.newest import newest_name, set_newest

logger = logging.getLogger(__name__)


class Journal:
    """The writing end. Safe to use from several threads, whose records share syncs.

    Args:
        folder: Where the segments are.
        next_lsn: Of the first record to be written; everything before is durable.
        segment_bytes: Size at which a new segment is begun. The first one is made for the first record, so that a
            journal can be opened on a full disk.
        clock: The time.

    Attributes:
        bytes_written: Of records and marks since it was opened, headers and padding included.

    Raises:
        OSError: What was read of an older journal cannot be made durable.
    """

    def __init__(self, folder: Path, next_lsn: int, segment_bytes: int = 64 << 20, clock: Clock = SYSTEM) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._lock = clock.condition(clock.lock())
        self._next_lsn = next_lsn
        self._durable_lsn = next_lsn - 1
        self._syncing = False
        # Counts failed syncs; what was written before one and not durable is taken back.
        self._failures = 0
        self._segment: _OpenSegment | None = None
        # One that was left behind, with records in it that were refused and are not cut yet.
        self._uncut: _OpenSegment | None = None
        self._closed = False
        self._durable_end = SEGMENT.size
        self.bytes_written = 0
        # What a killed process has written may have been read from the system's cache only.
        for path in segment_paths(folder)[-1:]:
            sync_file(path)

    @property
    def last_lsn(self) -> int:
        """Of the last durable record."""
        with self._lock:
            return self._durable_lsn

    def append(self, kind: int, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """Write a record and return its lsn when it is on disk.

        Raises:
            OSError: It is not, and will not be found there later. The journal can be used again; while the disk refuses
                to have a refused record cut, it refuses all others as well.
            ClosedError: The journal was closed.
        """
        checksum = 0
        for part in payload:
            checksum = zlib.crc32(part, checksum)
        size_bytes = sum(len(part) for part in payload)
        with self._lock:
            lsn = self._write(kind, meta, payload, size_bytes, checksum)
            failures = self._failures
            while self._durable_lsn < lsn and self._failures == failures:
                # One thread syncs for all that have written so far; the others wait for it.
                if self._syncing:
                    self._lock.wait()
                elif self._segment is not None:
                    self._sync(self._segment)
                else:
                    raise ClosedError("the journal was closed")
            if self._failures != failures:
                raise OSError("the journal could not be synced, and the record was taken back")
            return lsn

    def cut_before(self, lsn: int) -> None:
        """Remove the segments whose records all come before `lsn`."""
        # The next segment is there before it is noted, and until then the one that is noted has to be there as well.
        noted = newest_name(self._folder)
        for path, following in pairwise(segment_paths(self._folder)):
            if first_lsn_of(following) > lsn or path.name == noted:
                break
            path.unlink()
        with self._lock:
            # The last one as well, where nothing is written to it any more: on a full disk its room is needed.
            if self._segment is None and self._durable_lsn < lsn:
                set_newest(self._folder, None)
                for path in segment_paths(self._folder):
                    path.unlink()
                sync_folder(self._folder)
                # What was refused has gone with its file.
                if self._uncut is not None:
                    self._uncut.close()
                    self._uncut = None
        sync_folder(self._folder)

    def close(self) -> None:
        """Close the segment, with everything in it durable, and nothing in it that was refused."""
        with self._lock:
            self._closed = True
            try:
                self._settle()
            except OSError:
                logger.exception("the journal's end could not be synced, and nobody was told that it was")
            self._leave_segment()
            try:
                self._cut()
            except OSError:
                logger.exception("a record that was refused could not be cut; it may be taken for one that was written")
                if self._uncut is not None:
                    self._uncut.close()
            self._uncut = None

    def _write(self, kind: int, meta: bytes, payload: Sequence[Buffer], size_bytes: int, checksum: int) -> int:
        """Write a record behind the last; called under the lock."""
        self._check_open()
        while (segment := self._segment) is None or segment.is_too_full_for(RECORD.size + len(meta) + size_bytes):
            self._new_segment()
        lsn = self._next_lsn
        start = segment.form.header(kind, lsn, self._durable_lsn, meta, size_bytes, checksum)
        self.bytes_written += segment.write([start, meta, *payload])
        self._next_lsn = lsn + 1
        return lsn

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the journal was closed")

    def _cut(self) -> None:
        """Cut what was refused from the segment that was left behind, or raise OSError."""
        if self._uncut is not None:
            self._uncut.cut(durably=True)
            self._uncut.close()
            self._uncut = None

    def _settle(self) -> None:
        """Wait until everything in the present segment is durable or taken back; called under the lock.

        Others may write during a sync, which would be lost if the segment were left after it.

        Raises:
            OSError: Something was taken back.
        """
        while self._syncing or (self._segment is not None and self._durable_lsn < self._next_lsn - 1):
            if self._syncing:
                self._lock.wait()
            elif self._segment is not None:
                self._sync(self._segment)

    def _new_segment(self) -> None:
        """Go on in a new segment."""
        before = self._segment
        self._settle()
        # Another thread may have been here meanwhile.
        if self._segment is before:
            if before is not None:
                self._leave_segment()
                before.check_found()
            # Others had the lock meanwhile.
            self._check_open()
            self._cut()
            self._segment = _OpenSegment(self._folder, self._next_lsn, self._segment_bytes)
            self._durable_end = self._segment.end

    def _leave_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is None:
            return
        if segment.is_cut:
            segment.close()
        else:
            self._uncut = segment

    def _sync(self, segment: _OpenSegment) -> None:
        """Make durable what has been written so far; called under the lock, which others can have meanwhile.

        Raises:
            OSError: Nothing that was not durable before counts any more.
        """
        target, end = self._next_lsn - 1, segment.end
        self._syncing = True
        self._lock.release()
        failure: OSError | None = None
        try:
            segment.sync()
        except OSError as error:
            failure = error
        finally:
            self._lock.acquire()
            self._syncing = False
            self._lock.notify_all()
        if failure is not None:
            # Nobody knows what is on disk now, and a second sync of the same file would lie about it.
            logger.error("the journal could not be synced (%s); %s is left behind", failure, segment.path)
            self._failures += 1
            self._next_lsn = self._durable_lsn + 1
            # The next segment says with its first lsn how much of this one counts; but there may never be one.
            segment.take_back(self._durable_end, durably=True)
            self._leave_segment()
            raise failure
        self._durable_lsn, self._durable_end = target, end
        if target == self._next_lsn - 1:
            self.bytes_written += segment.mark(target)


class _OpenSegment:
    """The segment that is being written. Not safe to use from several threads.

    Attributes:
        path: Its file.
        form: Of its records.
        end: Byte behind the last record.
    """

    def __init__(self, folder: Path, first_lsn: int, size_bytes: int) -> None:
        self._capacity = size_bytes
        self.form = Form.drawn()
        attempt = 1 + max(
            (attempt_of(path) for path in segment_paths(folder) if first_lsn_of(path) == first_lsn), default=0
        )
        if attempt > MAX_ATTEMPTS:
            raise OSError(f"{MAX_ATTEMPTS} files of the journal begin at record {first_lsn}, each left for its errors")
        self.path = folder / f"{first_lsn:020d}-{attempt:04d}.journal"
        # Made under another name, so that a segment without its header is never seen.
        temporary = self.path.with_suffix(".tmp")
        self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(self._descriptor, 0, size_bytes)
            write_all(self._descriptor, [self.form.segment_header(first_lsn)], 0)
            os.fsync(self._descriptor)
            temporary.rename(self.path)
            sync_folder(folder)
            set_newest(folder, self.path)
        except OSError:
            os.close(self._descriptor)
            temporary.unlink(missing_ok=True)
            if newest_name(folder) != self.path.name:
                self.path.unlink(missing_ok=True)
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
            write_all(self._descriptor, [*parts, bytes(padding(size))], self.end)
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
        os.fdatasync(self._descriptor)
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
            os.ftruncate(self._descriptor, self._cut_at)
            if durably:
                os.fsync(self._descriptor)
            self._cut_at = None

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


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
