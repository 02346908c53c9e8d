"""The reading end: the records that count, and the difference between a torn tail and damage."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from optserve_server.persistence.journal.format import (
    ALIGNMENT,
    MARK,
    CorruptionError,
    Form,
    Found,
    JournalError,
    Record,
    first_lsn_of,
    form_of,
    parse_header,
    segment_paths,
)
from optserve_server.persistence.journal.newest import check_newest

_WINDOW_BYTES = 1 << 20
_CHECKED_BYTES_PER_BYTE = 4
"""Where a key is no secret, so many bytes are checked at most for each byte that is searched."""


class Reader:
    """The reading end: all records that count, in order, from `after_lsn` on.

    Attributes:
        next_lsn: Of the first record that a journal that goes on from here writes.
        torn: Where the tail was torn, if it was.
        bytes_read: Of records, so far.
    """

    def __init__(self, folder: Path, after_lsn: int) -> None:
        self._folder = folder
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
        check_newest(self._folder)
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
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise CorruptionError(path, 0, "the segment has no header")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                yield from self._records(path, view, form_of(path, view), end_lsn)

    def _records(self, path: Path, view: memoryview, form: Form, end_lsn: int | None) -> Iterator[Record]:
        offset, expected = form.begin, first_lsn_of(path)
        while end_lsn is None or expected < end_lsn:
            found = parse_header(view, offset, form)
            if found is None or (found.kind != MARK and found.lsn != expected) or not found.has_payload(view):
                self._end(path, view, form, offset, expected)
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

    def _end(self, path: Path, view: memoryview, form: Form, offset: int, expected: int) -> None:
        """There is no whole record at `offset`: that is the end, a torn tail, or damage."""
        if any(found.durable >= expected for found in _records_behind(path, view, form, offset, expected)):
            raise CorruptionError(path, offset, f"record {expected}, which had been acknowledged, is not readable")
        if any(view[offset : offset + form.record.size]):
            self.torn = (path, offset)


def _records_behind(path: Path, view: memoryview, form: Form, offset: int, expected: int) -> Iterator[Found]:
    """What there is of records from `offset` on, where record `expected` is not whole.

    Payloads are skipped. What is found must be possible: all records before it lie between it and `offset`.

    Raises:
        CorruptionError: In a segment of format 1 there is more that looks like a record than can be looked at.
    """
    budget = _CHECKED_BYTES_PER_BYTE * len(view)
    keys = _Keys(view, form)
    position: int | None = offset
    while position is not None and position < len(view):
        found = parse_header(view, position, form)
        most = (position - offset) // form.record.size
        if (
            found is not None
            and found.durable < expected + most
            and (found.kind == MARK or found.lsn <= expected + most)
        ):
            yield found
            position = found.end
            continue
        if not form.drawn_at_random:
            budget -= _claimed_bytes(view, position, form)
            if budget < 0:
                raise CorruptionError(path, offset, f"record {expected} is not readable, nor is what follows it")
        position = keys.find(position + ALIGNMENT)


def _claimed_bytes(view: memoryview, position: int, form: Form) -> int:
    """Bytes that were checked in vain for what might have been a record."""
    if position + form.record.size > len(view):
        return 0
    meta_bytes = form.record.unpack_from(view, position)[5]
    return form.record.size + (meta_bytes if meta_bytes <= len(view) - position else 0)


class _Keys:
    """Finds a segment's key, at places where a record can begin, further and further behind."""

    def __init__(self, view: memoryview, form: Form) -> None:
        self._view = view
        self._form = form
        self._begin = 0
        self._window = b""

    def find(self, start: int) -> int | None:
        """The first place from `start` on."""
        key = self._form.key_bytes
        while start < len(self._view):
            if not self._begin <= start < self._begin + len(self._window) - len(key):
                # Copied by the piece: to search a mapping itself reads behind its end before Python 3.11.5 (gh-105235).
                self._begin, self._window = start, bytes(self._view[start : start + _WINDOW_BYTES])
            at = self._window.find(key, start - self._begin)
            if at < 0:
                start = self._begin + max(len(self._window) - len(key) + 1, 1)
            elif (self._begin + at - self._form.begin) % ALIGNMENT == 0:
                return self._begin + at
            else:
                start = self._begin + at + 1
        return None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}.") from error
