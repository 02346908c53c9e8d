"""Whatever a client's gradients look like, they are never taken for records, and a start stays quick."""

import mmap
import os
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from optserve_server.persistence import journal
from optserve_server.persistence.disk import Disk
from optserve_server.persistence.journal import CorruptionError, Journal, Reader
from optserve_server.persistence.journal import format as on_disk
from present import present

STEP = 1
OLD = on_disk.RecordFormat(on_disk.KEY_V1, on_disk.RECORD_HEADER_V1, on_disk.SEGMENT_HEADER_V1.size)
LARGE = 8 << 20
QUICK_S = 20.0
"""Less than half of what 8 MiB of headers took when each was looked at; a second or so on a quiet machine."""


def padded(record: bytes) -> bytes:
    return record + bytes(on_disk.padding(len(record)))


def record(record_format: on_disk.RecordFormat, lsn: int, durable: int, payload: bytes, kind: int = STEP) -> bytes:
    meta = (
        b"" if kind == on_disk.MARK else f"meta {lsn:07d}".encode()
    )  # so that payloads of format 1 are aligned as records are
    number = 0 if kind == on_disk.MARK else lsn
    return padded(
        record_format.encode_header(kind, number, durable, meta, len(payload), zlib.crc32(payload)) + meta + payload
    )


def old_segment(folder, records: bytes):
    """A segment as the first format had it."""
    partial = on_disk.SEGMENT_HEADER_V1.pack(on_disk.SEGMENT_MAGIC, 1, 1, 0)[:-4]
    path = folder / f"{1:020d}-0001.journal"
    path.write_bytes(partial + struct.pack("<I", zlib.crc32(partial)) + records + bytes(1 << 16))
    return path


def new_segment(folder, record_format: on_disk.RecordFormat, records: bytes):
    path = folder / f"{1:020d}-0001.journal"
    path.write_bytes(record_format.encode_segment_header(1) + records + bytes(1 << 16))
    return path


def forged(record_format: on_disk.RecordFormat, size: int, meta_bytes: int = 0, durable: int = 2) -> bytes:
    """Headers, one behind the other, that say that a record is durable."""
    if meta_bytes:
        fields = (record_format.key, STEP, 0, 3, durable, meta_bytes, 0, 0, 0)
        one = record_format.header.pack(*fields)
    else:
        one = record_format.encode_header(STEP, 3, durable, b"", 0, 0)
    one = padded(one)
    return one * (size // len(one))


def is_read(folder) -> tuple[list[int], Reader]:
    reader = Reader(folder, 0)
    return [found.lsn for found in reader], reader


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
@pytest.mark.parametrize("cut_at", [0.0, 0.5, 1.0], ids=["no payload", "half", "all but the end"])
def test_a_torn_record_full_of_forged_headers_is_torn(tmp_path, old, cut_at):
    """As kill -9 in the middle of a write leaves it: the header, and a part of what it claims."""
    record_format = OLD if old else on_disk.RecordFormat.with_random_key()
    # Known to everybody who reads the source; of the random key of a segment nobody knows anything.
    payload = forged(OLD, LARGE) + b"end"
    torn = record(record_format, 2, 1, payload)
    head = len(torn) - len(padded(payload))
    torn = torn[: head + int(cut_at * (len(payload) - 4))]
    whole = record(record_format, 1, 0, b"good") + record(record_format, 0, 1, b"", on_disk.MARK)
    (old_segment if old else lambda folder, content: new_segment(folder, record_format, content))(
        tmp_path, whole + torn
    )
    start = time.monotonic()
    found, reader = is_read(tmp_path)
    assert time.monotonic() - start < QUICK_S
    assert (found, reader.torn_tail is not None, reader.next_lsn) == ([1], True, 2)


@pytest.mark.parametrize("guess", [OLD, on_disk.RecordFormat(0x0123456789ABCDEF)], ids=["format 1", "format 2"])
def test_payload_behind_a_lost_header_is_not_looked_at(tmp_path, guess):
    """As a power cut leaves it that took the page with the header, and not those with the gradients."""
    record_format = on_disk.RecordFormat.with_random_key()
    whole = record(record_format, 1, 0, b"good")
    new_segment(tmp_path, record_format, whole + bytes(4096) + forged(guess, LARGE))
    start = time.monotonic()
    found, _ = is_read(tmp_path)
    assert time.monotonic() - start < QUICK_S
    assert found == [1]


def test_a_mapping_is_never_searched(tmp_path, monkeypatch):
    """To search one reads behind its end before Python 3.11.5, and ends the process where nothing is mapped there."""

    class Mapping(mmap.mmap):
        def find(self, *_arguments):
            raise AssertionError("a mapping was searched")

        rfind = find

    monkeypatch.setattr(mmap, "mmap", Mapping)
    record_format = on_disk.RecordFormat.with_random_key()
    # A segment that ends with its last record, as one of a folder that was closed properly does, and a torn one.
    for content in (record(record_format, 1, 0, b"good"), record(record_format, 1, 0, b"good") + b"torn" * 100):
        path = new_segment(tmp_path, record_format, content)
        os.truncate(path, path.stat().st_size - (1 << 16))
        assert is_read(tmp_path)[0] == [1]


def test_two_segments_have_different_keys(tmp_path):
    keys = set()
    for first in range(1, 20):
        writer = Journal(tmp_path, first, segment_bytes=4096)
        writer.append(STEP, b"", [b"x"])
        writer.close()
        (path, *_) = reversed(journal.segment_paths(tmp_path))
        keys.add(on_disk.record_format_of(path, memoryview(path.read_bytes())).key)
    assert len(keys) == 19


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
@pytest.mark.parametrize("part", ["header", "meta", "payload", "length"])
def test_damage_to_what_was_acknowledged_is_never_cut(tmp_path, old, part):
    """A later record says that the damaged one was durable, whatever lies between them."""
    record_format = OLD if old else on_disk.RecordFormat.with_random_key()
    first = record(record_format, 1, 0, b"good")
    second = bytearray(record(record_format, 2, 1, forged(replace(OLD, key=7), 50_000)))
    place = {
        "header": 9,
        "meta": record_format.header.size + 1,
        "payload": 30_000,
        "length": record_format.header.size - 16,
    }[part]
    second[place] ^= 1
    mark = record(record_format, 0, 2, b"", on_disk.MARK)
    content = first + bytes(second) + mark
    path = old_segment(tmp_path, content) if old else new_segment(tmp_path, record_format, content)
    with pytest.raises(CorruptionError) as caught:
        is_read(tmp_path)
    assert (caught.value.path, caught.value.offset) == (path, record_format.first_offset + len(first))


@pytest.mark.parametrize("meta_bytes", [0, 1 << 20], ids=["whole headers", "headers that claim a large meta"])
def test_the_first_format_is_searched_for_a_bounded_time_and_never_cut_in_doubt(tmp_path, meta_bytes):
    """There a lost header cannot be told from damage, where what lies behind it looks like records."""
    content = record(OLD, 1, 0, b"good") + bytes(4096) + forged(OLD, LARGE, durable=1 << 40)
    content += forged(OLD, LARGE, meta_bytes)
    old_segment(tmp_path, content)
    start = time.monotonic()
    with pytest.raises(CorruptionError, match="record 2"):
        is_read(tmp_path)
    assert time.monotonic() - start < QUICK_S


def test_a_claim_that_no_record_can_make_is_none(tmp_path):
    """Between a torn record and another there is not room for as many as that one says to be durable."""
    content = record(OLD, 1, 0, b"good") + b"torn" + bytes(60)
    content += forged(OLD, LARGE, durable=1 << 20) + OLD.encode_header(on_disk.MARK, 0, 1 << 40, b"", 0, 0)
    old_segment(tmp_path, content)
    found, reader = is_read(tmp_path)
    assert (found, reader.torn_tail is not None) == ([1], True)


def test_what_is_written_while_a_segment_is_left_is_synced_before_that(tmp_path, monkeypatch):
    """A record that fits into the old segment comes while that is synced for the last time."""
    writer = Journal(tmp_path, 1, segment_bytes=4096)
    writer.append(STEP, b"", [bytes(100)])
    real, unsynced = os.fdatasync, {}
    entered = []

    def fdatasync(descriptor):
        entered.append(os.fstat(descriptor).st_ino)
        if len(entered) == 1:
            # As another thread does that has the lock meanwhile; it waits for its sync later.
            with writer._lock:
                writer._write(STEP, b"late", [bytes(10)], 10, zlib.crc32(bytes(10)))
            unsynced["end"] = present(writer._segment).end
        real(descriptor)
        if len(entered) > 1 and entered[-1] == entered[0]:
            unsynced.clear()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    # Not durable yet, so that the segment has to be synced when the next one takes its place.
    with writer._lock:
        writer._write(STEP, b"first", [bytes(10)], 10, zlib.crc32(bytes(10)))
    writer.append(STEP, b"", [bytes(5000)])
    writer.close()
    assert not unsynced
    assert [found.lsn for found in Reader(tmp_path, 0)] == [1, 2, 3, 4]


def test_the_newest_segment_is_missed(tmp_path):
    writer = Journal(tmp_path, 1, segment_bytes=4096)
    for _ in range(3):
        writer.append(STEP, b"", [bytes(3000)])
    writer.close()
    *_, newest = journal.segment_paths(tmp_path)
    newest.unlink()
    with pytest.raises(CorruptionError, match=f"{newest.name} is damaged at byte 0: the newest file of the journal is"):
        is_read(tmp_path)
    # Given up on purpose, the rest is good.
    assert journal.truncate_journal(tmp_path, newest, 0) == 0
    assert is_read(tmp_path)[0] == [1, 2]


def test_files_of_other_names_are_somebody_elses(tmp_path):
    writer = Journal(tmp_path, 1, segment_bytes=4096)
    writer.append(STEP, b"", [b"x"])
    writer.close()
    (tmp_path / "notes.journal").write_text("Nothing happened today.")
    assert is_read(tmp_path)[0] == [1]
    assert len(journal.segment_paths(tmp_path)) == 1


def test_a_journal_is_opened_without_room_and_its_last_segment_is_cut(tmp_path, monkeypatch):
    writer = Journal(tmp_path, 1, segment_bytes=4096)
    writer.append(STEP, b"", [bytes(3000)])
    writer.close()

    def no_room(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        writer = Journal(tmp_path, 2, segment_bytes=4096)
        with pytest.raises(OSError, match="No space"):
            writer.append(STEP, b"", [b"x"])
        writer.delete_before(2)
        assert not list(tmp_path.iterdir())
    assert writer.append(STEP, b"", [b"x"]) == 2
    writer.close()
    assert [found.lsn for found in Reader(tmp_path, 1)] == [2]


class Killed(BaseException):
    """The process ends."""


class DiskOfTheDying(Disk):
    """The process ends where it would note a segment."""

    def open(self, path: Path, flags: int) -> int:
        if path.name == "NEWEST_SEGMENT.tmp":
            raise Killed
        return super().open(path, flags)

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        if path.name == "NEWEST_SEGMENT":
            raise Killed
        super().unlink(path, missing_ok=missing_ok)


def test_the_segment_that_is_noted_stays_until_another_one_is_noted(tmp_path):
    def dying() -> Journal:
        return Journal(tmp_path, 2, segment_bytes=4096, disk=DiskOfTheDying())

    writer = Journal(tmp_path, 1, segment_bytes=4096)
    writer.append(STEP, b"", [b"x"])
    writer.close()
    # The next segment has its name and is not noted yet.
    with pytest.raises(Killed):
        dying().append(STEP, b"", [b"y"])
    assert len(journal.segment_paths(tmp_path)) == 2
    assert is_read(tmp_path)[0] == [1]
    # A snapshot takes the place of both.
    with pytest.raises(Killed):
        dying().delete_before(2)
    reader = Reader(tmp_path, 1)
    assert not list(reader)
    writer = Journal(tmp_path, reader.next_lsn, segment_bytes=4096)
    writer.delete_before(2)
    assert not journal.segment_paths(tmp_path)
    assert writer.append(STEP, b"", [b"z"]) == 2
    writer.close()
    assert [found.lsn for found in Reader(tmp_path, 1)] == [2]
