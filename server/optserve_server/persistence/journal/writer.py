"""The writing end: records to disk, several threads sharing a sync."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from optserve._common.clock import SYSTEM, Clock
from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.journal.format import (
    RECORD,
    SEGMENT,
    Buffer,
    ClosedError,
    first_lsn_of,
    segment_paths,
)
from optserve_server.persistence.journal.newest import newest_name, set_newest
from optserve_server.persistence.journal.open_segment import OpenSegment, write_anew

logger = logging.getLogger(__name__)


class Journal:
    """The writing end. Safe to use from several threads, whose records share syncs.

    Args:
        folder: Where the segments are.
        next_lsn: Of the first record to be written; everything before is durable.
        segment_bytes: Size at which a new segment is begun. The first one is made for the first record, so that a
            journal can be opened on a full disk.
        clock: The time.
        disk: Where the folder is.

    Attributes:
        bytes_written: Of records and marks since it was opened, headers and padding included.

    Raises:
        OSError: What was read of an older journal cannot be made durable.
    """

    def __init__(
        self,
        folder: Path,
        next_lsn: int,
        segment_bytes: int = 64 << 20,
        clock: Clock = SYSTEM,
        disk: Disk = SYSTEM_DISK,
    ) -> None:
        self._folder = folder
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._lock = clock.condition(clock.lock())
        self._next_lsn = next_lsn
        self._durable_lsn = next_lsn - 1
        self._syncing = False
        # Counts failed syncs; what was written before one and not durable is taken back.
        self._failures = 0
        self._segment: OpenSegment | None = None
        # One that was left behind, with records in it that were refused and are not cut yet.
        self._uncut: OpenSegment | None = None
        self._closed = False
        self._durable_end = SEGMENT.size
        self.bytes_written = 0
        # What a killed process has written may have been read from the system's cache only.
        for path in segment_paths(folder)[-1:]:
            write_anew(path, disk)

    @property
    def last_lsn(self) -> int:
        """Of the last durable record."""
        with self._lock:
            return self._durable_lsn

    def append(self, kind: int, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """Write a record and return its lsn when it is on disk.

        Raises:
            OSError: It is not, and will not be found there later, unless `cut_refused` says so. The journal can be used
                again; while the disk refuses to have a refused record cut, it refuses all others as well.
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

    def cut_refused(self) -> None:
        """Cut the records that were refused and are still there, if there are any.

        Raises:
            OSError: The disk does not let them be cut; if the process ends before it does, they may be found.
        """
        # Without the lock, which others hold for long, as there hardly ever is one.
        segment = self._segment
        if self._uncut is None and (segment is None or segment.is_cut):
            return
        with self._lock:
            self._cut()
            if self._segment is not None:
                self._segment.cut()

    def cut_before(self, lsn: int) -> None:
        """Remove the segments whose records all come before `lsn`."""
        # The next segment is there before it is noted, and until then the one that is noted has to be there as well.
        noted = newest_name(self._folder)
        for path, following in pairwise(segment_paths(self._folder)):
            if first_lsn_of(following) > lsn or path.name == noted:
                break
            self._disk.unlink(path)
        with self._lock:
            # The last one as well, where nothing is written to it any more: on a full disk its room is needed.
            if self._segment is None and self._durable_lsn < lsn:
                set_newest(self._folder, None, self._disk)
                for path in segment_paths(self._folder):
                    self._disk.unlink(path)
                self._disk.sync_path(self._folder)
                # What was refused has gone with its file.
                if self._uncut is not None:
                    self._uncut.close()
                    self._uncut = None
        self._disk.sync_path(self._folder)

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
            self._segment = OpenSegment(self._folder, self._next_lsn, self._segment_bytes, self._disk)
            self._durable_end = self._segment.end

    def _leave_segment(self) -> None:
        segment = self._segment
        if segment is None:
            return
        # First, for those who look without the lock.
        if not segment.is_cut:
            self._uncut = segment
        self._segment = None
        if segment.is_cut:
            segment.close()

    def _sync(self, segment: OpenSegment) -> None:
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
