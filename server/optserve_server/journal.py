"""An append-only journal of records in segment files: group-committed, checksummed, and sceptical of disks.

It knows bytes, not optimizers. A record is on disk when `append` returns; if `append` raises, it never was.

    segment = header, records, zeros      (preallocated, so that a sync need not write file sizes)
    record  = header with checksums, meta, payload, padding

A log sequence number (lsn) counts records from 1. Each record also says up to which lsn everything was on disk when it
was written, and after a sync an empty record, a mark, says so too. That tells a torn tail, which nobody was promised
and which is cut, from damage to what had been acknowledged, which is an error. A segment ends where the next one's
first lsn begins: after a failed sync the old segment is left behind and its doubtful tail never counts.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARK = 0
"""Record type of the journal's own: it says what is durable, and has no lsn of its own."""

_SEGMENT_MAGIC = b"OPTSRVJ\n"
_SEGMENT = struct.Struct("<8sIQI")
_RECORD_MAGIC = 0x4A52_5350
_RECORD = struct.Struct("<IHHQQIQII")
_ALIGNMENT = 8
_MAX_META_BYTES = 64 << 20
_IOV_MAX = 512

Buffer = bytes | memoryview


class JournalError(Exception):
    """The journal cannot be read or written. The message names the file and says what to do."""


class CorruptionError(JournalError):
    """A record that had been acknowledged is damaged.

    Attributes:
        path: The segment.
        offset: First damaged byte's record, in bytes from the start of the segment.
    """

    def __init__(self, path: Path, offset: int, what: str) -> None:
        super().__init__(f"{path} is damaged at byte {offset}: {what}.")
        self.path = path
        self.offset = offset


@dataclass(frozen=True)
class Record:
    """One entry. `meta` is small; `payload` may be large."""

    type: int
    lsn: int
    meta: bytes
    payload: memoryview
    path: Path
    offset: int


def segment_paths(folder: Path) -> list[Path]:
    """The segments of a journal, oldest first."""
    return sorted(folder.glob("*.journal"))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _padding(size: int) -> int:
    return -size % _ALIGNMENT


def _header(kind: int, lsn: int, durable: int, meta: Buffer, payload_bytes: int, payload_crc: int) -> bytes:
    fields = (_RECORD_MAGIC, kind, 0, lsn, durable, len(meta), payload_bytes, payload_crc)
    partial = _RECORD.pack(*fields, 0)[:-4]
    return partial + struct.pack("<I", zlib.crc32(meta, zlib.crc32(partial)))


class Journal:
    """The writing end. Safe to use from several threads, whose records share syncs.

    Args:
        folder: Where the segments are.
        next_lsn: Of the first record to be written; everything before is durable.
        segment_bytes: Size at which a new segment is begun.

    Raises:
        OSError: The first segment cannot be made.
    """

    def __init__(self, folder: Path, next_lsn: int, segment_bytes: int = 64 << 20) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._lock = threading.Condition(threading.Lock())
        self._next_lsn = next_lsn
        self._durable_lsn = next_lsn - 1
        self._syncing = False
        # Counts failed syncs; what was written before one and not durable is taken back.
        self._failures = 0
        self._segment = _OpenSegment(folder, next_lsn, segment_bytes)
        self._durable_end = self._segment.end

    @property
    def last_lsn(self) -> int:
        """Of the last durable record."""
        with self._lock:
            return self._durable_lsn

    def append(self, kind: int, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """Write a record and return its lsn when it is on disk.

        Raises:
            OSError: It is not, and will not be found there later. The journal can be used again.
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
                else:
                    self._sync()
            if self._failures != failures:
                raise OSError("the journal could not be synced, and the record was taken back")
            return lsn

    def cut_before(self, lsn: int) -> None:
        """Remove the segments whose records all come before `lsn`."""
        paths = segment_paths(self._folder)
        for path, following in pairwise(paths):
            if _first_lsn(following) > lsn:
                break
            path.unlink()
        sync_folder(self._folder)

    def close(self) -> None:
        """Close the segment; what was appended is durable already."""
        with self._lock:
            self._wait_for_sync()
            self._segment.close()

    def _write(self, kind: int, meta: bytes, payload: Sequence[Buffer], size_bytes: int, checksum: int) -> int:
        """Write a record behind the last; called under the lock."""
        if self._segment.must_be_left(_RECORD.size + len(meta) + size_bytes):
            self._new_segment()
        lsn = self._next_lsn
        header = _header(kind, lsn, self._durable_lsn, meta, size_bytes, checksum)
        self._segment.write([header, meta, *payload])
        self._next_lsn = lsn + 1
        return lsn

    def _wait_for_sync(self) -> None:
        while self._syncing:
            self._lock.wait()

    def _new_segment(self) -> None:
        """Go on in a new segment, with everything in the present one durable or taken back."""
        self._wait_for_sync()
        if self._durable_lsn < self._next_lsn - 1:
            self._sync()
        self._segment.close()
        self._segment = _OpenSegment(self._folder, self._next_lsn, self._segment_bytes)
        self._durable_end = self._segment.end

    def _sync(self) -> None:
        """Make durable what has been written so far; called under the lock, which others can have meanwhile.

        Raises:
            OSError: Nothing that was not durable before counts any more.
        """
        segment, target, end = self._segment, self._next_lsn - 1, self._segment.end
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
            # The next segment says with its first lsn how much of this one counts.
            segment.leave(self._durable_end)
            raise failure
        self._durable_lsn, self._durable_end = target, end
        if target == self._next_lsn - 1:
            segment.mark(target)


class _OpenSegment:
    """The segment that is being written. Not safe to use from several threads.

    Attributes:
        path: Its file.
        end: Byte behind the last record.
    """

    def __init__(self, folder: Path, first_lsn: int, size_bytes: int) -> None:
        self._capacity = size_bytes
        attempt = 1 + max(
            (_attempt(path) for path in segment_paths(folder) if _first_lsn(path) == first_lsn), default=0
        )
        self.path = folder / f"{first_lsn:020d}-{attempt:04d}.journal"
        header = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, first_lsn, 0)[:-4]
        header += struct.pack("<I", zlib.crc32(header))
        # Made under another name, so that a segment without its header is never seen.
        temporary = self.path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            _write_all(descriptor, [header], 0)
            os.fsync(descriptor)
            temporary.rename(self.path)
            sync_folder(folder)
        except OSError:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self._descriptor: int | None = descriptor
        self.end = _SEGMENT.size

    def must_be_left(self, record_bytes: int) -> bool:
        """Whether a record of that size belongs into a new segment."""
        if self._descriptor is None:
            return True
        return self.end > _SEGMENT.size and self.end + record_bytes > self._capacity

    def write(self, parts: list[Buffer]) -> None:
        """Write a record behind the last, or raise OSError and have written nothing that counts."""
        if self._descriptor is None:
            raise OSError("the journal has no segment")
        size = sum(len(part) for part in parts)
        try:
            _write_all(self._descriptor, [*parts, bytes(_padding(size))], self.end)
        except OSError:
            # A part of a record is no record; zeros instead keep it from being taken for a torn one.
            self._zero_from(self.end)
            raise
        self.end += size + _padding(size)

    def mark(self, durable_lsn: int) -> None:
        """Note what is durable. Not synced: worth having, and no loss if it is lost."""
        try:
            self.write([_header(MARK, 0, durable_lsn, b"", 0, 0)])
        except OSError as error:
            logger.warning("the journal's mark could not be written: %s", error)

    def sync(self) -> None:
        """Wait until the disk has it."""
        if self._descriptor is None:
            raise OSError("the journal has no segment")
        os.fdatasync(self._descriptor)

    def leave(self, durable_end: int) -> None:
        """Close it after a failed sync, and take back what was not durable, as far as the disk lets us."""
        if self._descriptor is not None:
            self._zero_from(durable_end)
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _zero_from(self, position: int) -> None:
        if self._descriptor is None:
            return
        try:
            os.ftruncate(self._descriptor, position)
        except OSError as error:
            logger.warning("%s: the end could not be cut: %s", self.path, error)


class Reader:
    """The reading end: all records that count, in order, from `after_lsn` on.

    Attributes:
        next_lsn: Of the first record that a journal that goes on from here writes.
        torn: Where the tail was torn, if it was.
        bytes_read: Of records, so far.
    """

    def __init__(self, folder: Path, after_lsn: int) -> None:
        self._paths = segment_paths(folder)
        self._after_lsn = after_lsn
        self.next_lsn = after_lsn + 1
        self.torn: tuple[Path, int] | None = None
        self.bytes_read = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all segments, unused room included."""
        return sum(path.stat().st_size for path in self._paths)

    def __iter__(self) -> Iterator[Record]:
        """The records.

        Raises:
            CorruptionError: What had been acknowledged is damaged or missing.
        """
        first_lsns = [_first_lsn(path) for path in self._paths]
        if first_lsns and first_lsns[0] > self.next_lsn:
            raise CorruptionError(self._paths[0], 0, f"records {self.next_lsn} to {first_lsns[0] - 1} are missing")
        for position, path in enumerate(self._paths):
            end_lsn = first_lsns[position + 1] if position + 1 < len(first_lsns) else None
            if end_lsn is not None and end_lsn <= self.next_lsn:
                continue
            yield from self._read_segment(path, end_lsn)
            if end_lsn is not None and self.next_lsn < end_lsn:
                where = self.torn or (path, 0)
                raise CorruptionError(path, where[1], f"records {self.next_lsn} to {end_lsn - 1} are missing")
            self.torn = self.torn if end_lsn is None else None

    def _read_segment(self, path: Path, end_lsn: int | None) -> Iterator[Record]:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _SEGMENT.size:
                raise CorruptionError(path, 0, "the segment has no header")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                _check_segment(path, view)
                yield from self._records(path, view, end_lsn)

    def _records(self, path: Path, view: memoryview, end_lsn: int | None) -> Iterator[Record]:
        offset, expected = _SEGMENT.size, _first_lsn(path)
        while end_lsn is None or expected < end_lsn:
            found = _parse(view, offset)
            if found is None or (found.kind != MARK and found.lsn != expected):
                self._end(path, view, offset, expected)
                return
            if found.kind != MARK:
                if found.lsn > self._after_lsn:
                    with view[found.payload : found.payload + found.payload_bytes] as payload:
                        meta = bytes(view[found.meta : found.payload])
                        yield Record(found.kind, found.lsn, meta, payload, path, offset)
                expected += 1
                self.next_lsn = max(self.next_lsn, expected)
            self.bytes_read += found.end - offset
            offset = found.end

    def _end(self, path: Path, view: memoryview, offset: int, expected: int) -> None:
        """There is no record at `offset`: that is the end, a torn tail, or damage."""
        durable = _durable_after(view, offset)
        if durable >= expected:
            raise CorruptionError(path, offset, f"record {expected}, which had been acknowledged, is not readable")
        if any(view[offset : offset + _RECORD.size]):
            self.torn = (path, offset)


@dataclass(frozen=True)
class _Found:
    kind: int
    lsn: int
    durable: int
    meta: int
    payload: int
    payload_bytes: int
    end: int


def _check_segment(path: Path, view: memoryview) -> None:
    magic, version, first_lsn, checksum = _SEGMENT.unpack_from(view)
    if magic != _SEGMENT_MAGIC or zlib.crc32(view[: _SEGMENT.size - 4]) != checksum or first_lsn != _first_lsn(path):
        raise CorruptionError(path, 0, "its header is not readable")
    if version > FORMAT_VERSION:
        raise JournalError(f"{path} has format {version}; this server knows up to {FORMAT_VERSION}. Use a newer one.")


def _parse(view: memoryview, offset: int, *, check_payload: bool = True) -> _Found | None:
    """The record at an offset, if there is a whole and undamaged one."""
    if offset + _RECORD.size > len(view):
        return None
    magic, kind, _, lsn, durable, meta_bytes, payload_bytes, payload_crc, checksum = _RECORD.unpack_from(view, offset)
    meta = offset + _RECORD.size
    payload = meta + meta_bytes
    if magic != _RECORD_MAGIC or payload + payload_bytes > len(view):
        return None
    if zlib.crc32(view[meta:payload], zlib.crc32(view[offset : meta - 4])) != checksum:
        return None
    if check_payload and zlib.crc32(view[payload : payload + payload_bytes]) != payload_crc:
        return None
    end = payload + payload_bytes
    return _Found(kind, lsn, durable, meta, payload, payload_bytes, end + _padding(end - offset))


def _durable_after(view: memoryview, offset: int) -> int:
    """The highest lsn that any record behind `offset` knows to be on disk; 0 if there is none."""
    durable = 0
    magic = struct.pack("<I", _RECORD_MAGIC)
    rest = bytes(view[offset:])
    position = rest.find(magic, 1)
    while position >= 0:
        found = _parse(view, offset + position, check_payload=False)
        if found is not None:
            durable = max(durable, found.durable)
        position = rest.find(magic, position + 1)
    return durable


def _write_all(descriptor: int, parts: Sequence[Buffer], position: int) -> None:
    """Write all of the parts, however few bytes the disk takes at a time."""
    pending = [memoryview(part).cast("B") for part in parts if len(part)]
    while pending:
        written = os.pwritev(descriptor, pending[:_IOV_MAX], position)
        if written == 0:
            raise OSError("the disk took no bytes")
        position += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def _first_lsn(path: Path) -> int:
    return int(path.name[:20])


def _attempt(path: Path) -> int:
    return int(path.name[21:25])
