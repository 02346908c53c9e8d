"""Writes records to the journal. Threads that write at the same time share a sync."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from optserve._common.clock import SYSTEM, Clock
from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.journal.format import (
    RECORD_HEADER,
    SEGMENT_HEADER,
    Buffer,
    ClosedError,
    first_lsn_of,
    segment_paths,
)
from optserve_server.persistence.journal.newest import note_newest_segment, noted_segment
from optserve_server.persistence.journal.open_segment import OpenSegment, rewrite_segment

logger = logging.getLogger(__name__)


class Journal:
    """A journal that is open for writing. Safe to use from several threads, which share syncs.

    Args:
        folder: The folder of the segments.
        next_lsn: LSN of the first record to write. All earlier records are durable.
        segment_bytes: Size of a segment. The first segment is created with the first record, so a journal can be opened
            on a full disk.
        clock: The time.
        disk: The disk of the folder.

    Attributes:
        bytes_written: Bytes of the records and marks that were written since it was opened, with headers and padding.

    Raises:
        OSError: The disk refuses to make the newest existing segment durable.
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
        # Counts failed syncs. A failed sync removes all records that are not durable.
        self._failed_syncs = 0
        self._segment: OpenSegment | None = None
        # An earlier segment that still contains refused records, because the disk refused to truncate it.
        self._refused_segment: OpenSegment | None = None
        self._closed = False
        self._durable_end = SEGMENT_HEADER.size
        self.bytes_written = 0
        # A killed process may have left the newest records in the system's cache only.
        for path in segment_paths(folder)[-1:]:
            rewrite_segment(path, disk)

    @property
    def last_lsn(self) -> int:
        """LSN of the last durable record."""
        with self._lock:
            return self._durable_lsn

    def append(self, kind: int, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """Write a record, wait until it is on disk, and return its LSN.

        Args:
            kind: Kind of change.
            meta: The record's message.
            payload: The bytes of the record's arrays, in order.

        Raises:
            OSError: The disk refuses the record. A later start does not find it, unless `remove_refused` raises OSError
                too. The journal stays open, but accepts no record until the refused one is removed.
            ClosedError: The journal is closed.
        """
        checksum = 0
        for part in payload:
            checksum = zlib.crc32(part, checksum)
        size_bytes = sum(len(part) for part in payload)
        with self._lock:
            lsn = self._write(kind, meta, payload, size_bytes, checksum)
            failed_syncs = self._failed_syncs
            while self._durable_lsn < lsn and self._failed_syncs == failed_syncs:
                # One thread syncs the records of all threads; the others wait for it.
                if self._syncing:
                    self._lock.wait()
                elif self._segment is not None:
                    self._sync(self._segment)
                else:
                    raise ClosedError("the journal is closed")
            if self._failed_syncs != failed_syncs:
                raise OSError("the journal could not be synced, and the record was refused")
            return lsn

    def remove_refused(self) -> None:
        """Remove refused records that are still in a segment because the disk has refused to truncate it.

        Raises:
            OSError: The disk refuses again. If the process ends now, the next start may find such a record.
        """
        # Checked without the lock, because other threads hold that during their syncs, and refused records are rare.
        segment = self._segment
        if self._refused_segment is None and (segment is None or not segment.has_refused_records):
            return
        with self._lock:
            self._truncate_refused_segment()
            if self._segment is not None:
                self._segment.remove_refused()

    def delete_before(self, lsn: int) -> None:
        """Delete the segments whose records all come before `lsn`."""
        # A new segment exists before it is noted as the newest. Until then the segment that is noted must exist too.
        noted = noted_segment(self._folder)
        for path, following in pairwise(segment_paths(self._folder)):
            if first_lsn_of(following) > lsn or path.name == noted:
                break
            self._disk.unlink(path)
        with self._lock:
            # If no segment is open, the last one is deleted too: a full disk needs the space.
            if self._segment is None and self._durable_lsn < lsn:
                note_newest_segment(self._folder, None, self._disk)
                for path in segment_paths(self._folder):
                    self._disk.unlink(path)
                self._disk.sync_path(self._folder)
                # The refused records were deleted with their segment.
                if self._refused_segment is not None:
                    self._refused_segment.close()
                    self._refused_segment = None
        self._disk.sync_path(self._folder)

    def close(self) -> None:
        """Sync the open segment, remove refused records, and close it. Errors of the disk are logged."""
        with self._lock:
            self._closed = True
            try:
                self._sync_all()
            except OSError:
                logger.exception("the end of the journal could not be synced; no record in it was acknowledged")
            self._leave_segment()
            try:
                self._truncate_refused_segment()
            except OSError:
                logger.exception("a refused record could not be removed; the next start may find its change made")
                if self._refused_segment is not None:
                    self._refused_segment.close()
            self._refused_segment = None

    def _write(self, kind: int, meta: bytes, payload: Sequence[Buffer], size_bytes: int, checksum: int) -> int:
        """Write a record after the last one. The caller holds the lock."""
        self._check_open()
        while (segment := self._segment) is None or segment.is_too_full_for(
            RECORD_HEADER.size + len(meta) + size_bytes
        ):
            self._new_segment()
        lsn = self._next_lsn
        header = segment.format.encode_header(kind, lsn, self._durable_lsn, meta, size_bytes, checksum)
        self.bytes_written += segment.write([header, meta, *payload])
        self._next_lsn = lsn + 1
        return lsn

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the journal is closed")

    def _truncate_refused_segment(self) -> None:
        """Remove refused records from an earlier segment, and close it. The caller holds the lock.

        Raises:
            OSError: The disk refuses.
        """
        if self._refused_segment is not None:
            self._refused_segment.remove_refused(durably=True)
            self._refused_segment.close()
            self._refused_segment = None

    def _sync_all(self) -> None:
        """Wait until every record in the open segment is durable. The caller holds the lock.

        Other threads may write during a sync, so there may be several.

        Raises:
            OSError: A sync has failed. The records that were not durable are removed.
        """
        while self._syncing or (self._segment is not None and self._durable_lsn < self._next_lsn - 1):
            if self._syncing:
                self._lock.wait()
            elif self._segment is not None:
                self._sync(self._segment)

    def _new_segment(self) -> None:
        """Continue in a new segment. The caller holds the lock, which other threads can have during the syncs."""
        before = self._segment
        self._sync_all()
        # Another thread may have done so during the syncs.
        if self._segment is before:
            if before is not None:
                self._leave_segment()
                before.check_in_place()
            # Another thread may have closed the journal during the syncs.
            self._check_open()
            self._truncate_refused_segment()
            self._segment = OpenSegment(self._folder, self._next_lsn, self._segment_bytes, self._disk)
            self._durable_end = self._segment.end

    def _leave_segment(self) -> None:
        """Write no more to the open segment. It is closed, unless refused records have to be removed from it first."""
        segment = self._segment
        if segment is None:
            return
        # Set before `_segment` is cleared, because `remove_refused` looks at both without the lock.
        if segment.has_refused_records:
            self._refused_segment = segment
        self._segment = None
        if not segment.has_refused_records:
            segment.close()

    def _sync(self, segment: OpenSegment) -> None:
        """Make all records durable that were written so far.

        The caller holds the lock. Other threads can have it during the sync.

        Raises:
            OSError: The sync has failed. The records that were not durable before are removed.
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
            # What is on disk is unknown now, and a second sync of the same file could succeed without writing it.
            logger.error("the journal could not be synced (%s); nothing more is written to %s", failure, segment.path)
            self._failed_syncs += 1
            self._next_lsn = self._durable_lsn + 1
            # The first LSN of the next segment would end this one too, but there may never be a next segment.
            segment.truncate(self._durable_end, durably=True)
            self._leave_segment()
            raise failure
        self._durable_lsn, self._durable_end = target, end
        if target == self._next_lsn - 1:
            self.bytes_written += segment.write_mark(target)
