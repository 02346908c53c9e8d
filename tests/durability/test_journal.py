"""The journal keeps what it has acknowledged, and nothing else, whatever the disk does."""

import errno
import os
import threading

import pytest

from optserve_server.persistence import journal
from optserve_server.persistence.journal import CorruptionError, Journal, Reader
from optserve_server.persistence.journal import format as on_disk
from present import present

STEP = 1


def payload(index: int, size: int = 700) -> bytes:
    return bytes([index % 251]) * size


def write(folder, count: int, first: int = 1, **options) -> None:
    writer = Journal(folder, first, **options)
    for index in range(first, first + count):
        assert writer.append(STEP, f"meta {index}".encode(), [payload(index)[:100], payload(index)[100:]]) == index
    writer.close()


def read(folder, after: int = 0) -> list[int]:
    reader = Reader(folder, after)
    found = []
    for record in reader:
        assert record.meta == f"meta {record.lsn}".encode()
        assert bytes(record.payload) == payload(record.lsn)
        found.append(record.lsn)
    return found


def test_what_was_appended_is_read_in_order(tmp_path):
    write(tmp_path, 20, segment_bytes=1 << 16)
    assert read(tmp_path) == list(range(1, 21))
    assert read(tmp_path, after=15) == list(range(16, 21))


def test_a_journal_goes_on_in_new_segments(tmp_path):
    write(tmp_path, 50, segment_bytes=4096)
    assert len(journal.segment_paths(tmp_path)) > 5
    assert read(tmp_path) == list(range(1, 51))
    write(tmp_path, 10, first=51, segment_bytes=4096)
    assert read(tmp_path) == list(range(1, 61))


def test_a_record_larger_than_a_segment_has_one_of_its_own(tmp_path):
    writer = Journal(tmp_path, 1, segment_bytes=4096)
    for size in (10, 100_000, 10):
        writer.append(STEP, b"", [bytes(size)])
    writer.close()
    assert [len(record.payload) for record in Reader(tmp_path, 0)] == [10, 100_000, 10]


def test_segments_before_a_snapshot_are_deleted(tmp_path):
    write(tmp_path, 50, segment_bytes=4096)
    before = len(journal.segment_paths(tmp_path))
    writer = Journal(tmp_path, 51, segment_bytes=4096)
    writer.delete_before(40)
    writer.close()
    assert len(journal.segment_paths(tmp_path)) < before
    assert read(tmp_path, after=39) == list(range(40, 51))
    with pytest.raises(CorruptionError, match="records 1 to"):
        read(tmp_path)


def test_threads_share_syncs(tmp_path, monkeypatch):
    syncs = 0
    real = os.fdatasync

    def fdatasync(descriptor):
        nonlocal syncs
        syncs += 1
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    writer = Journal(tmp_path, 1, segment_bytes=1 << 20)
    lsns: list[int] = []

    def append():
        lsns.extend(writer.append(STEP, b"", [b"x" * 100]) for _ in range(50))

    threads = [threading.Thread(target=append) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert sorted(lsns) == list(range(1, 401))
    assert [record.lsn for record in Reader(tmp_path, 0)] == list(range(1, 401))
    assert syncs < 400


def segment(folder):
    (path,) = journal.segment_paths(folder)
    return path


def used_bytes(path) -> int:
    return len(path.read_bytes().rstrip(b"\0"))


def test_a_torn_last_record_is_cut_and_said(tmp_path):
    writer = Journal(tmp_path, 1, segment_bytes=1 << 16)
    for index in range(1, 4):
        writer.append(STEP, f"meta {index}".encode(), [payload(index)])
    # The process dies while it writes the fourth: a part is there, nobody was told.
    header = present(writer._segment).format.encode_header(STEP, 4, 3, b"meta 4", 700, 0)
    os.pwrite(present(writer._segment)._descriptor, header + b"meta 4" + payload(4)[:300], present(writer._segment).end)
    reader = Reader(tmp_path, 0)
    assert [record.lsn for record in reader] == [1, 2, 3]
    assert reader.torn_tail is not None
    assert reader.next_lsn == 4
    write(tmp_path, 3, first=4, segment_bytes=1 << 16)
    assert read(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path):
    write(tmp_path, 6, segment_bytes=8192)
    path = segment(tmp_path)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, used_bytes(path)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        found = error = None
        try:
            found = read(tmp_path)
        except CorruptionError as caught:
            error = caught
        if error is None:
            assert found == [1, 2, 3, 4, 5, 6]
        else:
            assert (error.path, error.offset <= position) == (path, True)
            refused += 1
    assert refused > 4000


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_is_no_record_and_the_journal_goes_on(tmp_path, monkeypatch, error):
    writer = Journal(tmp_path, 1, segment_bytes=1 << 16)
    writer.append(STEP, b"meta 1", [payload(1)])
    real = os.pwritev
    calls = 0

    def pwritev(descriptor, buffers, position):
        nonlocal calls
        calls += 1
        if calls == 1:
            # A short write first, then nothing more.
            return real(descriptor, [bytes(buffers[0])[:20]], position)
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        with pytest.raises(OSError, match=os.strerror(error)):
            writer.append(STEP, b"meta 2", [payload(2)])
    assert read(tmp_path) == [1]
    assert writer.append(STEP, b"meta 2", [payload(2)]) == 2
    writer.close()
    assert read(tmp_path) == [1, 2]


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, position: real(fd, [bytes(parts[0])[:7]], position))
    write(tmp_path, 3, segment_bytes=1 << 16)
    assert read(tmp_path) == [1, 2, 3]


def test_after_a_failed_sync_the_segment_is_never_trusted_again(tmp_path, monkeypatch):
    writer = Journal(tmp_path, 1, segment_bytes=1 << 16)
    writer.append(STEP, b"meta 1", [payload(1)])
    real = os.fdatasync

    def fdatasync(descriptor):
        raise OSError(errno.EIO, "the disk failed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(OSError, match="the disk failed"):
            writer.append(STEP, b"refused", [payload(2)])
    assert os.fdatasync is real
    assert read(tmp_path) == [1]
    assert writer.append(STEP, b"meta 2", [payload(2)]) == 2
    writer.append(STEP, b"meta 3", [payload(3)])
    writer.close()
    assert len(journal.segment_paths(tmp_path)) == 2
    assert read(tmp_path) == [1, 2, 3]


def failing(error: int):
    """A call to the disk that fails."""

    def call(*_arguments):
        raise OSError(error, os.strerror(error))

    return call


def refused_and_not_truncated(folder, monkeypatch, call: str) -> Journal:
    """A journal whose second record was written as a whole and refused, while the disk refused to truncate it too."""
    writer = Journal(folder, 1, segment_bytes=1 << 16)
    writer.append(STEP, b"meta 1", [payload(1)])
    real = os.pwritev

    def pwritev(descriptor, buffers, position):
        # All but the padding, and nothing more.
        if len(buffers) == 1 and not any(bytes(buffers[0])):
            raise OSError(errno.EIO, "the disk failed")
        return real(descriptor, buffers[:-1] if len(buffers) > 1 else buffers, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing(errno.EIO))
        patch.setattr(os, call, pwritev if call == "pwritev" else failing(errno.EIO))
        with pytest.raises(OSError, match=r"failed|Input/output error"):
            writer.append(STEP, b"meta 2", [payload(2)])
    return writer


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
def test_a_refused_record_that_could_not_be_removed_is_removed_at_the_end(tmp_path, monkeypatch, call):
    """A start took it for one that had been written."""
    writer = refused_and_not_truncated(tmp_path, monkeypatch, call)
    assert read(tmp_path) == [1, 2]  # which nobody could help, had the server been killed
    writer.close()
    assert read(tmp_path) == [1]
    write(tmp_path, 2, first=2, segment_bytes=1 << 16)
    assert read(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
def test_no_record_is_taken_before_a_refused_one_is_removed(tmp_path, monkeypatch, call):
    writer = refused_and_not_truncated(tmp_path, monkeypatch, call)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing(errno.EIO))
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                writer.append(STEP, b"meta 2", [payload(2)])
    assert writer.append(STEP, b"meta 2", [payload(2)]) == 2
    writer.close()
    assert read(tmp_path) == [1, 2]


def test_a_refused_record_goes_with_the_file_that_a_snapshot_replaces(tmp_path, monkeypatch):
    writer = refused_and_not_truncated(tmp_path, monkeypatch, "fdatasync")
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing(errno.EIO))
        writer.delete_before(2)
        assert writer.append(STEP, b"meta 2", [payload(2)]) == 2
        writer.close()
    assert read(tmp_path, after=1) == [2]


def test_a_journal_that_was_closed_takes_nothing(tmp_path):
    """A record was written to a new segment, which nobody closed."""
    writer = Journal(tmp_path, 1, segment_bytes=1 << 16)
    writer.append(STEP, b"meta 1", [payload(1)])
    writer.close()
    writer.close()
    with pytest.raises(journal.ClosedError, match="is closed"):
        writer.append(STEP, b"meta 2", [payload(2)])
    assert read(tmp_path) == [1]


def test_no_room_for_a_new_segment_refuses_records_until_there_is(tmp_path, monkeypatch):
    writer = Journal(tmp_path, 1, segment_bytes=2048)
    written = 0

    def no_room(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        refused = False
        while not refused:
            written += 1
            try:
                writer.append(STEP, f"meta {written}".encode(), [payload(written)])
            except OSError:
                refused = True
        with pytest.raises(OSError, match="No space"):
            writer.append(STEP, f"meta {written}".encode(), [payload(written)])
    assert read(tmp_path) == list(range(1, written))
    assert writer.append(STEP, f"meta {written}".encode(), [payload(written)]) == written
    writer.close()
    assert read(tmp_path) == list(range(1, written + 1))


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "FORMAT_VERSION", 3)
    write(tmp_path, 1, segment_bytes=4096)
    monkeypatch.undo()
    with pytest.raises(journal.JournalError, match="format 3"):
        read(tmp_path)
