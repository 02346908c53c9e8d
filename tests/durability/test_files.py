"""Writing to files: all bytes, or an error, whatever the disk takes at a time."""

import os

import pytest

from optserve_server.persistence.files import write_all


class Disk:
    """A file that takes at most so many bytes at a time, and so many in all.

    Attributes:
        content: What it has taken.
        calls: How often it was asked.
    """

    def __init__(self, at_a_time: int, in_all: int) -> None:
        self.content = bytearray()
        self.calls = 0
        self._at_a_time, self._left = at_a_time, in_all

    def pwritev(self, _descriptor: int, parts: list[memoryview], position: int) -> int:
        self.calls += 1
        if self.calls > 1000:
            raise AssertionError("the disk is asked for ever")
        assert position == len(self.content)
        taken = b"".join(parts)[: min(self._at_a_time, self._left)]
        self.content += taken
        self._left -= len(taken)
        return len(taken)


PARTS = (b"head", b"", memoryview(bytes(range(200))).cast("H"), b"tail")
WHOLE = b"head" + bytes(range(200)) + b"tail"


@pytest.mark.parametrize("at_a_time", [1, 3, 4, 5, 203, 204, 1000])
def test_all_parts_are_written_however_few_bytes_are_taken_at_a_time(monkeypatch, at_a_time):
    disk = Disk(at_a_time, 1000)
    monkeypatch.setattr(os, "pwritev", disk.pwritev)
    write_all(0, PARTS, 0)
    assert disk.content == WHOLE


@pytest.mark.parametrize("in_all", [0, 4, 100, 207])
def test_a_disk_that_takes_no_bytes_is_an_error_and_not_asked_for_ever(monkeypatch, in_all):
    disk = Disk(64, in_all)
    monkeypatch.setattr(os, "pwritev", disk.pwritev)
    with pytest.raises(OSError, match="took no bytes"):
        write_all(0, PARTS, 0)
    assert disk.content == WHOLE[:in_all]


def test_more_parts_than_one_call_takes(tmp_path):
    parts = [bytes([n % 256]) * (n % 3) for n in range(5000)]
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), parts, 7)
    assert (tmp_path / "file").read_bytes() == bytes(7) + b"".join(parts)
