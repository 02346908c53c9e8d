"""How a journal looks on disk: names, headers, checksums, and finding a record at a place."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

FORMAT_VERSION = 1
MARK = 0
"""Record type of the journal's own: it says what is durable, and has no lsn of its own."""

SEGMENT_MAGIC = b"OPTSRVJ\n"
SEGMENT = struct.Struct("<8sIQI")
RECORD_MAGIC = 0x4A52_5350
RECORD = struct.Struct("<IHHQQIQII")
_ALIGNMENT = 8

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
        super().__init__(
            f"{path} is damaged at byte {offset}: {what}. Put the folder back from a copy; or cut the journal there, "
            f"which loses the steps after it, with: optserve journal repair {path.parent}"
        )
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


def cut_at(folder: Path, path: Path, offset: int) -> int:
    """Cut a journal at a byte of one of its segments; returns the number of later segments, which are removed."""
    later = [other for other in segment_paths(folder) if other.name > path.name]
    for other in reversed(later):
        other.unlink()
    if offset <= SEGMENT.size:
        path.unlink()
    else:
        os.truncate(path, offset)
    sync_folder(folder)
    return len(later)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def padding(size: int) -> int:
    """Bytes that bring `size` to the alignment of records."""
    return -size % _ALIGNMENT


def header(kind: int, lsn: int, durable: int, meta: Buffer, payload_bytes: int, payload_crc: int) -> bytes:
    """The start of a record."""
    fields = (RECORD_MAGIC, kind, 0, lsn, durable, len(meta), payload_bytes, payload_crc)
    partial = RECORD.pack(*fields, 0)[:-4]
    return partial + struct.pack("<I", zlib.crc32(meta, zlib.crc32(partial)))


def first_lsn_of(path: Path) -> int:
    """Of a segment, by its name."""
    return int(path.name[:20])


def attempt_of(path: Path) -> int:
    """Which of the segments with the same first lsn it is, by its name."""
    return int(path.name[21:25])


@dataclass(frozen=True)
class Found:
    """A record at a place: the places of its parts."""

    kind: int
    lsn: int
    durable: int
    meta: int
    payload: int
    payload_bytes: int
    end: int


def segment_header(first_lsn: int) -> bytes:
    """The start of a segment."""
    partial = SEGMENT.pack(SEGMENT_MAGIC, FORMAT_VERSION, first_lsn, 0)[:-4]
    return partial + struct.pack("<I", zlib.crc32(partial))


def check_segment(path: Path, view: memoryview) -> None:
    """Raise CorruptionError or JournalError unless a segment begins as it should."""
    magic, version, first_lsn, checksum = SEGMENT.unpack_from(view)
    if magic != SEGMENT_MAGIC or zlib.crc32(view[: SEGMENT.size - 4]) != checksum or first_lsn != first_lsn_of(path):
        raise CorruptionError(path, 0, "its header is not readable")
    if version > FORMAT_VERSION:
        raise JournalError(f"{path} has format {version}; this server knows up to {FORMAT_VERSION}. Use a newer one.")


def parse(view: memoryview, offset: int, *, check_payload: bool = True) -> Found | None:
    """The record at an offset, if there is a whole and undamaged one."""
    if offset + RECORD.size > len(view):
        return None
    magic, kind, _, lsn, durable, meta_bytes, payload_bytes, payload_crc, checksum = RECORD.unpack_from(view, offset)
    meta = offset + RECORD.size
    payload = meta + meta_bytes
    if magic != RECORD_MAGIC or payload + payload_bytes > len(view):
        return None
    if zlib.crc32(view[meta:payload], zlib.crc32(view[offset : meta - 4])) != checksum:
        return None
    if check_payload and zlib.crc32(view[payload : payload + payload_bytes]) != payload_crc:
        return None
    end = payload + payload_bytes
    return Found(kind, lsn, durable, meta, payload, payload_bytes, end + padding(end - offset))
