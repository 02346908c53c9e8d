"""Reads all records of a journal that count, in order. Distinguishes a torn tail from damage."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from optserve_server.persistence.journal.format import (
    ALIGNMENT,
    MARK,
    CorruptionError,
    JournalError,
    Record,
    RecordFormat,
    RecordHeader,
    first_lsn_of,
    parse_header,
    record_format_of,
    segment_paths,
)
from optserve_server.persistence.journal.newest import check_newest_segment

_WINDOW_BYTES = 1 << 20
_CHECKED_BYTES_PER_BYTE = 4
"""In a segment of format 1, whose key is no secret, the reader checks at most so many bytes per byte of the segment."""


class TornTail(NamedTuple):
    """The end of a segment where a record is not whole and was never acknowledged.

    Attributes:
        path: The segment.
        offset: Byte at which the record begins.
    """

    path: Path
    offset: int


class Reader:
    """Iterates over the records of a journal that count, in order.

    Args:
        folder: The folder of the journal.
        after_lsn: Records up to this LSN are left out.

    Attributes:
        next_lsn: LSN of the next record that a writer of this journal writes.
        torn_tail: The torn tail of the newest segment; None if that segment ends with a whole record.
        bytes_read: Bytes of records that were read so far.
    """

    def __init__(self, folder: Path, after_lsn: int) -> None:
        self._folder = folder
        self._paths = segment_paths(folder)
        self._after_lsn = after_lsn
        self.next_lsn = after_lsn + 1
        self.torn_tail: TornTail | None = None
        self.bytes_read = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all segments, with the part that no record was written to."""
        return sum(path.stat().st_size for path in self._paths)

    def __iter__(self) -> Iterator[Record]:
        """The records.

        Raises:
            CorruptionError: A record that was acknowledged is damaged or missing.
            JournalError: A segment cannot be read, or a newer server wrote it.
        """
        check_newest_segment(self._folder)
        first_lsns = [first_lsn_of(path) for path in self._paths]
        if first_lsns and first_lsns[0] > self.next_lsn:
            raise CorruptionError(self._paths[0], 0, f"records {self.next_lsn} to {first_lsns[0] - 1} are missing")
        for position, path in enumerate(self._paths):
            end_lsn = first_lsns[position + 1] if position + 1 < len(first_lsns) else None
            if end_lsn is not None and end_lsn <= self.next_lsn:
                continue
            yield from self._read_segment(path, end_lsn)
            if end_lsn is not None and self.next_lsn < end_lsn:
                offset = self.torn_tail.offset if self.torn_tail else 0
                raise CorruptionError(path, offset, f"records {self.next_lsn} to {end_lsn - 1} are missing")
            self.torn_tail = self.torn_tail if end_lsn is None else None

    def _read_segment(self, path: Path, end_lsn: int | None) -> Iterator[Record]:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise CorruptionError(path, 0, "the segment has no header")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                yield from self._records(path, view, record_format_of(path, view), end_lsn)

    def _records(
        self, path: Path, view: memoryview, record_format: RecordFormat, end_lsn: int | None
    ) -> Iterator[Record]:
        offset, expected_lsn = record_format.first_offset, first_lsn_of(path)
        while end_lsn is None or expected_lsn < end_lsn:
            header = parse_header(view, offset, record_format)
            if header is None or (header.kind != MARK and header.lsn != expected_lsn) or not header.has_payload(view):
                self._check_tail(path, view, record_format, offset, expected_lsn)
                return
            if header.kind != MARK:
                if header.lsn > self._after_lsn:
                    with view[header.payload_offset : header.payload_offset + header.payload_bytes] as payload:
                        meta = bytes(view[header.meta_offset : header.payload_offset])
                        yield Record(header.kind, header.lsn, meta, payload, path, offset)
                expected_lsn += 1
                self.next_lsn = max(self.next_lsn, expected_lsn)
            self.bytes_read += header.end - offset
            offset = header.end

    def _check_tail(
        self, path: Path, view: memoryview, record_format: RecordFormat, offset: int, expected_lsn: int
    ) -> None:
        """Decide what the tail of a segment is, where no whole record begins at `offset`.

        It is the end of the records, a torn tail, or damage.

        Raises:
            CorruptionError: It is damage: a later header says that record `expected_lsn` was on disk.
        """
        later = _headers_from(path, view, record_format, offset, expected_lsn)
        if any(header.durable_lsn >= expected_lsn for header in later):
            raise CorruptionError(path, offset, f"record {expected_lsn}, which had been acknowledged, is not readable")
        if any(view[offset : offset + record_format.header.size]):
            self.torn_tail = TornTail(path, offset)


def _headers_from(
    path: Path, view: memoryview, record_format: RecordFormat, offset: int, expected_lsn: int
) -> Iterator[RecordHeader]:
    """The headers from `offset` on, where record `expected_lsn` is not whole.

    Payloads are skipped, not searched. A header is left out if its LSNs are impossible: all records before it must fit
    between `offset` and itself.

    Raises:
        CorruptionError: A segment of format 1 has more bytes that may be records than the reader may check.
    """
    bytes_to_check = _CHECKED_BYTES_PER_BYTE * len(view)
    keys = _KeySearch(view, record_format)
    position: int | None = offset
    while position is not None and position < len(view):
        header = parse_header(view, position, record_format)
        # The most records that fit between `offset` and `position`.
        most_records = (position - offset) // record_format.header.size
        if (
            header is not None
            and header.durable_lsn < expected_lsn + most_records
            and (header.kind == MARK or header.lsn <= expected_lsn + most_records)
        ):
            yield header
            position = header.end
            continue
        if not record_format.has_random_key:
            bytes_to_check -= _checked_bytes(view, position, record_format)
            if bytes_to_check < 0:
                raise CorruptionError(path, offset, f"record {expected_lsn} is not readable, nor is what follows it")
        position = keys.find(position + ALIGNMENT)


def _checked_bytes(view: memoryview, position: int, record_format: RecordFormat) -> int:
    """How many bytes `parse_header` has read of something that is no valid header."""
    if position + record_format.header.size > len(view):
        return 0
    meta_bytes = record_format.header.unpack_from(view, position)[5]
    return record_format.header.size + (meta_bytes if meta_bytes <= len(view) - position else 0)


class _KeySearch:
    """Finds the key of a segment at the offsets where a record can begin. Each search starts after the one before."""

    def __init__(self, view: memoryview, record_format: RecordFormat) -> None:
        self._view = view
        self._format = record_format
        self._window_start = 0
        self._window = b""

    def find(self, start: int) -> int | None:
        """The first offset of the key from `start` on; None if the key does not occur there."""
        key = self._format.key_bytes
        while start < len(self._view):
            if not self._window_start <= start < self._window_start + len(self._window) - len(key):
                # Searched in a copy: before Python 3.11.5, a search in the mapping itself reads past its end
                # (gh-105235).
                self._window_start, self._window = start, bytes(self._view[start : start + _WINDOW_BYTES])
            index = self._window.find(key, start - self._window_start)
            if index < 0:
                start = self._window_start + max(len(self._window) - len(key) + 1, 1)
            elif (self._window_start + index - self._format.first_offset) % ALIGNMENT == 0:
                return self._window_start + index
            else:
                start = self._window_start + index + 1
        return None


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}.") from error
