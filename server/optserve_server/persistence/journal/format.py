"""The format of a journal on disk: names of segments, headers, checksums; and how to read one record's header."""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from optserve_server.persistence.disk import Buffer

FORMAT_VERSION = 2
MARK = 0
"""Kind of a mark: a record of the journal itself, which has a durable LSN, but no LSN of its own and no content."""

SEGMENT_MAGIC = b"OPTSRVJ\n"
SEGMENT_HEADER = struct.Struct("<8sIQIQII")
"""Magic, version, first LSN, checksum of these three; key, checksum of all fields before it, unused."""
RECORD_HEADER = struct.Struct("<QHHQQIQII")
"""Key, kind, unused, LSN, durable LSN, bytes of meta, bytes of payload, checksum of payload, checksum of the rest."""

SEGMENT_HEADER_V1 = struct.Struct("<8sIQI")
RECORD_HEADER_V1 = struct.Struct("<IHHQQIQII")
KEY_V1 = 0x4A52_5350
"""In format 1 the records of all segments began with this constant, in the place of the key."""

ALIGNMENT = 8
"""Records begin at multiples of this many bytes."""
MAX_ATTEMPTS = 9999
"""Most segments with the same first LSN. A segment's name has four digits for the attempt."""
_NAME = re.compile(r"(\d{20})-(\d{4})\.journal")


class JournalError(Exception):
    """The journal cannot be read or written. The message names the file and says what to do."""


class ClosedError(JournalError, OSError):
    """The journal is closed and accepts no record."""


class CorruptionError(JournalError):
    """A record that was acknowledged is damaged.

    Attributes:
        path: The segment.
        offset: Start of the damaged record, in bytes from the start of the segment.
    """

    def __init__(self, path: Path, offset: int, what: str) -> None:
        super().__init__(
            f"{path} is damaged at byte {offset}: {what}. Restore the folder from a copy; or truncate the journal "
            f"there, which loses the steps after it, with: optserve journal repair {path.parent}"
        )
        self.path = path
        self.offset = offset


@dataclass(frozen=True)
class Record:
    """One record of the journal. `meta` is small; `payload` may be large.

    Attributes:
        kind: Kind of change; see `engine/records.py`.
        lsn: Its log sequence number.
        meta: Its message, as JSON.
        payload: The bytes of its arrays, in the memory of the mapped segment.
        path: The segment.
        offset: Its first byte in the segment.
    """

    kind: int
    lsn: int
    meta: bytes
    payload: memoryview
    path: Path
    offset: int


def segment_paths(folder: Path) -> list[Path]:
    """The segments of a journal, oldest first. Files with other names are not the journal's."""
    return sorted(path for path in folder.glob("*.journal") if is_segment(path.name))


def is_segment(name: str) -> bool:
    """Whether a file of that name is a segment."""
    return _NAME.fullmatch(name) is not None


def first_lsn_of(path: Path) -> int:
    """The first LSN of a segment, from its name."""
    return int(path.name[:20])


def attempt_of(path: Path) -> int:
    """The attempt of a segment, from its name: 1 for the first segment that begins at its LSN, 2 for the next."""
    return int(path.name[21:25])


def padding(size: int) -> int:
    """The number of bytes that bring `size` to a multiple of `ALIGNMENT`."""
    return -size % ALIGNMENT


@dataclass(frozen=True)
class RecordFormat:
    """The format of the records of one segment.

    Attributes:
        key: The number at the start of each record. Since format 2 each segment has a random key that no client is
            given, so no bytes that a client sends look like a record.
        header: The struct of a record's header.
        first_offset: Byte of the segment at which the first record begins.
    """

    key: int
    header: struct.Struct = RECORD_HEADER
    first_offset: int = SEGMENT_HEADER.size

    @classmethod
    def with_random_key(cls) -> RecordFormat:
        """The format of a new segment."""
        # Never 0, because the unused part of a segment is filled with zeros.
        return cls(int.from_bytes(os.urandom(8), "little") | 1)

    @property
    def key_bytes(self) -> bytes:
        """The key as it is on disk."""
        return self.key.to_bytes(8 if self.has_random_key else 4, "little")

    @property
    def has_random_key(self) -> bool:
        """Whether the key is random. In format 1 it is a constant that everybody can read in the source."""
        return self.header is RECORD_HEADER

    def encode_segment_header(self, first_lsn: int) -> bytes:
        """The header of a segment."""
        # It begins with the header of format 1. A server that knows only format 1 reads the version and refuses it.
        partial = SEGMENT_HEADER_V1.pack(SEGMENT_MAGIC, FORMAT_VERSION, first_lsn, 0)[:-4]
        partial += struct.pack("<IQ", zlib.crc32(partial), self.key)
        return partial + struct.pack("<II", zlib.crc32(partial), 0)

    def encode_header(
        self, kind: int, lsn: int, durable_lsn: int, meta: Buffer, payload_bytes: int, payload_checksum: int
    ) -> bytes:
        """The header of a record."""
        fields = (self.key, kind, 0, lsn, durable_lsn, len(meta), payload_bytes, payload_checksum)
        partial = self.header.pack(*fields, 0)[:-4]
        return partial + struct.pack("<I", zlib.crc32(meta, zlib.crc32(partial)))


_FORMAT_V1 = RecordFormat(KEY_V1, RECORD_HEADER_V1, SEGMENT_HEADER_V1.size)


def record_format_of(path: Path, view: memoryview) -> RecordFormat:
    """Read and check the header of a segment.

    Args:
        path: The segment.
        view: All of its bytes.

    Returns:
        The format of its records.

    Raises:
        CorruptionError: The header is damaged, or does not belong to that name.
        JournalError: A newer server wrote the segment.
    """
    if len(view) < SEGMENT_HEADER_V1.size:
        raise CorruptionError(path, 0, "the segment has no header")
    magic, version, first_lsn, checksum = SEGMENT_HEADER_V1.unpack_from(view)
    damaged = zlib.crc32(view[: SEGMENT_HEADER_V1.size - 4]) != checksum
    if magic != SEGMENT_MAGIC or damaged or first_lsn != first_lsn_of(path):
        raise CorruptionError(path, 0, "its header is not readable")
    if version > FORMAT_VERSION:
        raise JournalError(f"{path} has format {version}; this server knows up to {FORMAT_VERSION}. Use a newer one.")
    if version == 1:
        return _FORMAT_V1
    if (
        len(view) < SEGMENT_HEADER.size
        or zlib.crc32(view[: SEGMENT_HEADER.size - 8]) != SEGMENT_HEADER.unpack_from(view)[5]
    ):
        raise CorruptionError(path, 0, "its header is not readable")
    return RecordFormat(SEGMENT_HEADER.unpack_from(view)[4])


@dataclass(frozen=True)
class RecordHeader:
    """An undamaged header of a record, and the offsets of the record's parts. The payload may be missing or damaged.

    Attributes:
        kind: Kind of change, or MARK.
        lsn: Its log sequence number; 0 for a mark.
        durable_lsn: When the record was written, all records up to this LSN were on disk.
        meta_offset: First byte of the meta in the segment.
        payload_offset: First byte of the payload in the segment.
        payload_bytes: Size of the payload.
        payload_checksum: CRC-32 of the payload.
        end: Byte of the segment after the record and its padding.
    """

    kind: int
    lsn: int
    durable_lsn: int
    meta_offset: int
    payload_offset: int
    payload_bytes: int
    payload_checksum: int
    end: int

    def has_payload(self, view: memoryview) -> bool:
        """Whether the payload is present and undamaged."""
        payload_end = self.payload_offset + self.payload_bytes
        return payload_end <= len(view) and zlib.crc32(view[self.payload_offset : payload_end]) == self.payload_checksum


def parse_header(view: memoryview, offset: int, record_format: RecordFormat) -> RecordHeader | None:
    """The header of the record at an offset of a segment; None unless header and meta are present and undamaged."""
    meta_offset = offset + record_format.header.size
    if meta_offset > len(view):
        return None
    key, kind, _, lsn, durable_lsn, meta_bytes, payload_bytes, payload_checksum, checksum = (
        record_format.header.unpack_from(view, offset)
    )
    payload_offset = meta_offset + meta_bytes
    if key != record_format.key or payload_offset > len(view):
        return None
    if zlib.crc32(view[meta_offset:payload_offset], zlib.crc32(view[offset : meta_offset - 4])) != checksum:
        return None
    end = payload_offset + payload_bytes
    end += padding(end - offset)
    return RecordHeader(kind, lsn, durable_lsn, meta_offset, payload_offset, payload_bytes, payload_checksum, end)
