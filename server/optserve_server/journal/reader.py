"""The reading end: the records that count, and the difference between a torn tail and damage."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from optserve_server.journal.format import (
    MARK,
    RECORD,
    RECORD_MAGIC,
    SEGMENT,
    CorruptionError,
    Record,
    check_segment,
    first_lsn_of,
    parse,
    segment_paths,
)


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
        first_lsns = [first_lsn_of(path) for path in self._paths]
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
            if size < SEGMENT.size:
                raise CorruptionError(path, 0, "the segment has no header")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                check_segment(path, view)
                yield from self._records(path, mapped, view, end_lsn)

    def _records(self, path: Path, mapped: mmap.mmap, view: memoryview, end_lsn: int | None) -> Iterator[Record]:
        offset, expected = SEGMENT.size, first_lsn_of(path)
        while end_lsn is None or expected < end_lsn:
            found = parse(view, offset)
            if found is None or (found.kind != MARK and found.lsn != expected):
                self._end(path, mapped, view, offset, expected)
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

    def _end(self, path: Path, mapped: mmap.mmap, view: memoryview, offset: int, expected: int) -> None:
        """There is no record at `offset`: that is the end, a torn tail, or damage."""
        durable = _durable_after(mapped, view, offset)
        if durable >= expected:
            raise CorruptionError(path, offset, f"record {expected}, which had been acknowledged, is not readable")
        if any(view[offset : offset + RECORD.size]):
            self.torn = (path, offset)


def _durable_after(mapped: mmap.mmap, view: memoryview, offset: int) -> int:
    """The highest lsn that any record behind `offset` knows to be on disk; 0 if there is none."""
    durable = 0
    magic = struct.pack("<I", RECORD_MAGIC)
    position = mapped.find(magic, offset + 1)
    while position >= 0:
        found = parse(view, position, check_payload=False)
        if found is not None:
            durable = max(durable, found.durable)
        position = mapped.find(magic, position + 1)
    return durable
