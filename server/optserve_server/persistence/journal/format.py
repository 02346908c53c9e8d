"""How a journal looks on disk: names, headers, checksums, and finding a record at a place."""

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
"""Record type of the journal's own: it says what is durable, and has no lsn of its own."""

SEGMENT_MAGIC = b"OPTSRVJ\n"
SEGMENT = struct.Struct("<8sIQIQII")
"""Magic, version, first lsn, checksum of these; key, checksum of everything before it, and nothing."""
RECORD = struct.Struct("<QHHQQIQII")
"""Key of the segment, kind, nothing, lsn, durable lsn, bytes of meta and payload, checksums of payload and the rest."""

OLD_SEGMENT = struct.Struct("<8sIQI")
RECORD_MAGIC = 0x4A52_5350
OLD_RECORD = struct.Struct("<IHHQQIQII")
"""Format 1 had a constant in the place of the key."""

ALIGNMENT = 8
MAX_ATTEMPTS = 9999
"""Segments with the same first lsn; their names have four digits for it."""
_NAME = re.compile(r"(\d{20})-(\d{4})\.journal")


class JournalError(Exception):
    """The journal cannot be read or written. The message names the file and says what to do."""


class ClosedError(JournalError, OSError):
    """The journal was closed; nothing is written to it any more."""


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
    """The segments of a journal, oldest first; files of other names are somebody else's."""
    return sorted(path for path in folder.glob("*.journal") if is_segment(path.name))


def is_segment(name: str) -> bool:
    """Whether a file of that name is one of ours."""
    return _NAME.fullmatch(name) is not None


def first_lsn_of(path: Path) -> int:
    """Of a segment, by its name."""
    return int(path.name[:20])


def attempt_of(path: Path) -> int:
    """Which of the segments with the same first lsn it is, by its name."""
    return int(path.name[21:25])


def padding(size: int) -> int:
    """Bytes that bring `size` to the alignment of records."""
    return -size % ALIGNMENT


@dataclass(frozen=True)
class Form:
    """How the records of one segment look.

    Attributes:
        key: What each of them begins with. It is drawn at random for each segment and told nobody, so whatever a client
            sends, no byte of it is ever taken for a record.
        record: Their header.
        begin: Byte of the first one.
    """

    key: int
    record: struct.Struct = RECORD
    begin: int = SEGMENT.size

    @classmethod
    def drawn(cls) -> Form:
        """That of a new segment."""
        # Never 0, which is what unused room is filled with.
        return cls(int.from_bytes(os.urandom(8), "little") | 1)

    @property
    def key_bytes(self) -> bytes:
        """The key as it is on disk."""
        return self.key.to_bytes(8 if self.record is RECORD else 4, "little")

    @property
    def drawn_at_random(self) -> bool:
        """Whether the key is known to nobody; format 1 had the same for all segments."""
        return self.record is RECORD

    def segment_header(self, first_lsn: int) -> bytes:
        """The start of a segment."""
        # As far as format 1 goes, it can be read by a server that knows no other, which then says so.
        partial = OLD_SEGMENT.pack(SEGMENT_MAGIC, FORMAT_VERSION, first_lsn, 0)[:-4]
        partial += struct.pack("<IQ", zlib.crc32(partial), self.key)
        return partial + struct.pack("<II", zlib.crc32(partial), 0)

    def header(self, kind: int, lsn: int, durable: int, meta: Buffer, payload_bytes: int, payload_crc: int) -> bytes:
        """The start of a record."""
        fields = (self.key, kind, 0, lsn, durable, len(meta), payload_bytes, payload_crc)
        partial = self.record.pack(*fields, 0)[:-4]
        return partial + struct.pack("<I", zlib.crc32(meta, zlib.crc32(partial)))


def form_of(path: Path, view: memoryview) -> Form:
    """The form of a whole segment, or CorruptionError or JournalError unless it begins as it should."""
    if len(view) < OLD_SEGMENT.size:
        raise CorruptionError(path, 0, "the segment has no header")
    magic, version, first_lsn, checksum = OLD_SEGMENT.unpack_from(view)
    damaged = zlib.crc32(view[: OLD_SEGMENT.size - 4]) != checksum
    if magic != SEGMENT_MAGIC or damaged or first_lsn != first_lsn_of(path):
        raise CorruptionError(path, 0, "its header is not readable")
    if version > FORMAT_VERSION:
        raise JournalError(f"{path} has format {version}; this server knows up to {FORMAT_VERSION}. Use a newer one.")
    if version == 1:
        return _OLD_FORM
    if len(view) < SEGMENT.size or zlib.crc32(view[: SEGMENT.size - 8]) != SEGMENT.unpack_from(view)[5]:
        raise CorruptionError(path, 0, "its header is not readable")
    return Form(SEGMENT.unpack_from(view)[4])


_OLD_FORM = Form(RECORD_MAGIC, OLD_RECORD, OLD_SEGMENT.size)


@dataclass(frozen=True)
class Found:
    """The header of a record at a place, and the places of its parts, of which the payload may not be there."""

    kind: int
    lsn: int
    durable: int
    meta: int
    payload: int
    payload_bytes: int
    payload_crc: int
    end: int

    def has_payload(self, view: memoryview) -> bool:
        """Whether the payload is there, and undamaged."""
        behind = self.payload + self.payload_bytes
        return behind <= len(view) and zlib.crc32(view[self.payload : behind]) == self.payload_crc


def parse_header(view: memoryview, offset: int, form: Form) -> Found | None:
    """The header of a record at an offset, with its meta, if there is an undamaged one."""
    if offset + form.record.size > len(view):
        return None
    key, kind, _, lsn, durable, meta_bytes, payload_bytes, payload_crc, checksum = form.record.unpack_from(view, offset)
    meta = offset + form.record.size
    payload = meta + meta_bytes
    if key != form.key or payload > len(view):
        return None
    if zlib.crc32(view[meta:payload], zlib.crc32(view[offset : meta - 4])) != checksum:
        return None
    end = payload + payload_bytes
    return Found(kind, lsn, durable, meta, payload, payload_bytes, payload_crc, end + padding(end - offset))


def parse(view: memoryview, offset: int, form: Form | None = None) -> Found | None:
    """The record at an offset of a segment, if there is a whole and undamaged one."""
    if form is None:
        form = Form(SEGMENT.unpack_from(view)[4])
    found = parse_header(view, offset, form)
    return found if found is not None and found.has_payload(view) else None
