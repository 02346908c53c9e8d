"""A full disk is no dead end, what is written is bounded, and both can be seen from outside."""

import errno
import logging
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from clocks import StoppedClock
from durability.folder import MIB, Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import OtherState
from optserve_server.engine.records import ArenaValues
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.schedule import AtSteps
from optserve_server.numerics.settings import Settings
from optserve_server.persistence import journal, snapshot
from optserve_server.persistence.upkeep import MAX_PAUSE_S, WARN_EVERY_S, Upkeep
from present import present

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """A disk with a size: files of a folder are refused beyond it when they are made."""

    def __init__(self, folder, monkeypatch, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._folder = folder
        self._real = os.posix_fallocate
        monkeypatch.setattr(os, "posix_fallocate", self._allocate)

    @property
    def used_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def _allocate(self, descriptor: int, offset: int, size: int) -> None:
        if self.used_bytes + size > self.size_bytes:
            raise NO_ROOM
        self._real(descriptor, offset, size)


def step_until_refused(item, index: int) -> int:
    while True:
        try:
            step(item, index)
        except OptserveError as error:
            if error.reason is not Reason.NOT_DURABLE:
                raise
            return index
        index += 1


def full(*_arguments):
    raise NO_ROOM


def test_a_full_disk_refuses_the_step_and_nothing_else(tmp_path, monkeypatch):
    server = Server(tmp_path)
    item = server.create()
    step(item, 0)
    before = fingerprint(item)
    zeros = [ArenaValues(dtype, slot, np.zeros(size, dtype)) for dtype, slot, size in item.layout.each_arena(2)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        for change in (
            lambda: step(item, 1),
            lambda: server.create("b"),
            lambda: server.optimizers.update("a", lambda _before, _layout: Settings(Adadelta(rho=0.5))),
            lambda: server.optimizers.replace(
                item, OtherState(5, item.layout, zeros), lambda _before, _layout: Settings(Adadelta(rho=0.5))
            ),
            lambda: server.optimizers.delete("a"),
        ):
            with pytest.raises(OptserveError, match="No space left") as caught:
                change()
            assert caught.value.reason is Reason.NOT_DURABLE
            assert caught.value.retry_after_s
    # All but the last reply, which the refused gradients have overwritten.
    assert fingerprint(item)[2:] == before[2:]
    assert item.steps.step == 1
    step(item, 1)
    server.create("b")
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    assert len(again.optimizers) == 2
    again.die()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_start_needs_no_room_where_nothing_is_written_in_place(tmp_path, monkeypatch, code):
    def refuse(*_arguments):
        raise OSError(code, os.strerror(code))

    server = Server(tmp_path)
    step(server.create(), 0)
    before = fingerprint(server.optimizers.get("a"))
    server.die()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


def test_a_disk_that_was_full_is_gone_on_with(tmp_path, monkeypatch):
    """Without waiting for more journal, for which there is no room; and a start needs none."""
    disk = Disk(tmp_path, monkeypatch, 8 * MIB)
    server = Server(tmp_path)
    item = server.create()
    tried = threading.Semaphore(0)
    real = snapshot.write

    def write(*arguments, **options):
        try:
            return real(*arguments, **options)
        finally:
            tried.release()

    monkeypatch.setattr(snapshot, "write", write)
    server.folder.start_snapshots(lambda _in_place: None)
    # Of the eight MiB the journal takes seven, and a snapshot of two and a half has no room.
    refused_at = step_until_refused(item, 0)
    assert refused_at > 5
    assert tried.acquire(timeout=30)
    assert "No space left" in server.folder.problem
    before = fingerprint(item)
    server.die()
    # A server starts on the full disk, with everything, and can be read.
    server = Server(tmp_path)
    item = server.optimizers.get("a")
    assert fingerprint(item)[2:] == before[2:]
    assert not server.folder.problem
    server.folder.start_snapshots(lambda _in_place: None)
    step_until_refused(item, refused_at)
    assert tried.acquire(timeout=30)
    # As soon as there is a little room, a snapshot takes the place of the journal.
    disk.size_bytes += 2 * MIB
    deadline = time.monotonic() + 60
    while server.folder.problem and time.monotonic() < deadline:
        tried.acquire(timeout=0.1)
    for index in range(refused_at, refused_at + 5):
        step(item, index)
    assert not server.folder.problem
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


def test_the_first_snapshot_after_failures_is_told_to_every_log(caplog):
    caplog.set_level(logging.INFO)
    upkeep = Upkeep(StoppedClock())
    upkeep.snapshot_written("calm", 0.1)
    assert not caplog.records
    upkeep.snapshot_failed(NO_ROOM)
    upkeep.snapshot_failed(NO_ROOM)
    upkeep.snapshot_written("first", 0.1)
    upkeep.snapshot_written("next", 0.1)
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "was written" in record.message]
    assert told == [("WARNING", "snapshot first was written; 2 before it had failed")]


def test_a_snapshot_that_failed_is_tried_again_where_nothing_is_refused_and_nothing_has_grown():
    """Else server info went on to say that snapshots cannot be written, of a disk that takes them."""
    clock = StoppedClock()
    upkeep = Upkeep(clock)
    upkeep.refused(NO_ROOM)
    upkeep.snapshot_failed(NO_ROOM)
    upkeep.accepted()
    assert not upkeep.is_snapshot_due(grown=False)
    clock.seconds += 1.0
    assert upkeep.is_snapshot_due(grown=False)
    assert upkeep.problem
    upkeep.snapshot_written("later", 0.1)
    assert not upkeep.problem
    assert not upkeep.is_snapshot_due(grown=False)


def test_a_snapshot_is_tried_at_once_when_the_disk_refuses_and_then_after_longer_and_longer_pauses():
    clock = StoppedClock()
    upkeep = Upkeep(clock)
    assert not upkeep.is_snapshot_due(grown=False)
    upkeep.refused(NO_ROOM)
    tried = []
    while clock.seconds < 1500:
        if upkeep.is_snapshot_due(grown=False):
            tried.append(clock.seconds - 1000)
            upkeep.snapshot_failed(NO_ROOM)
        clock.seconds += 1
    assert tried[:7] == [0, 1, 3, 7, 15, 31, 63]
    assert max(np.diff(tried)) == MAX_PAUSE_S
    # One that is made ends the refusal, and is not followed by another at once.
    clock.seconds += MAX_PAUSE_S
    upkeep.snapshot_written("s", 2.0)
    upkeep.refused(NO_ROOM)
    assert not upkeep.is_snapshot_due(grown=False)
    assert upkeep.is_snapshot_due(grown=True)
    clock.seconds += 21
    assert upkeep.is_snapshot_due(grown=False)


def test_what_is_wrong_is_said_once_a_minute(caplog):
    clock = StoppedClock()
    upkeep = Upkeep(clock)
    caplog.set_level(logging.WARNING)
    for _ in range(1000):
        upkeep.refused(NO_ROOM)
    assert [record.message.split(".")[0] for record in caplog.records] == [
        "the disk refuses changes: No space left on device"
    ]
    clock.seconds += WARN_EVERY_S
    upkeep.refused(NO_ROOM)
    assert len(caplog.records) == 2
    assert upkeep.problem == "the disk refuses changes: No space left on device"
    upkeep.accepted()
    upkeep.accepted()
    assert [record.message for record in caplog.records[2:]] == [
        "the disk accepts changes now; 1001 were refused before"
    ]
    assert not upkeep.problem
    upkeep.snapshot_failed(NO_ROOM)
    upkeep.accepted()
    assert "snapshots cannot be written" in upkeep.problem
    upkeep.snapshot_written("s", 1.0)
    assert not upkeep.problem


def test_settings_and_headers_count_as_journal(tmp_path, monkeypatch, caplog):
    """Changes that bring no gradient make a snapshot due as well, and are not written into the log whole."""
    caplog.set_level(logging.INFO)
    made = threading.Semaphore(0)
    real = snapshot.write
    monkeypatch.setattr(snapshot, "write", lambda *given, **options: (real(*given, **options), made.release())[0])
    server = Server(tmp_path, snapshot_bytes=3 * MIB)
    item = server.create()
    server.folder.start_snapshots(lambda _in_place: None)
    for turn in range(12):
        schedule = AtSteps(rate=0.5, milestones=tuple(range(turn, 60_000)))
        changed = replace(item.settings, rule=replace(item.rule, learning_rate=0.5), schedule=schedule)
        server.optimizers.update("a", lambda _before, _layout, changed=changed: changed)
    assert made.acquire(timeout=30)
    server.folder.close()
    assert sum(path.stat().st_size for path in journal.segment_paths(tmp_path)) < 5 * MIB
    assert sum(len(record.getMessage()) for record in caplog.records) < 10_000


def test_marks_and_padding_count_as_well(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    written = present(server.folder._journal).bytes_written
    for index in range(20):
        step(item, index, (1,))
    # As much as the file has grown by: twice the 88 bytes of each gradient and more.
    (path,) = journal.segment_paths(tmp_path)
    used = len(path.read_bytes().rstrip(b"\0"))
    assert 0 <= present(server.folder._journal).bytes_written + 40 - used < 64
    assert present(server.folder._journal).bytes_written - written > 20 * 2 * 88
    server.die()
    again = Server(tmp_path)
    assert -again.folder._bytes_at_snapshot > 20 * 2 * 88
    again.die()


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_nobody_else_may_read_a_data_folder(tmp_path, umask):
    from optserve_server.persistence.checkpoint_store import FolderStore
    from optserve_server.persistence.checkpoints import Checkpoints

    before = os.umask(umask)
    try:
        server = Server(tmp_path / "data")
        step(server.create(), 0)
        Checkpoints(server.optimizers, FolderStore(tmp_path / "data" / "checkpoints"), 10).save("a", "t")
        server.folder.snapshot()
        server.die()
        # Another way to keep a folder, with a file of its own.
        server = Server(tmp_path / "data", interval_s=3600)
        server.die()
        of_unclean = (tmp_path / "data" / "UNCLEAN").stat().st_mode
        again = Server(tmp_path / "data")
        step(again.optimizers.get("a"), 1)
        again.die()
    finally:
        os.umask(before)
    paths = [tmp_path / "data", *(tmp_path / "data").rglob("*")]
    assert {path.name for path in paths} >= {"LOCK", "manifest.json", "t.safetensors", "checkpoints", "NEWEST_SEGMENT"}
    open_to_others = [path for path in paths if path.stat().st_mode & 0o077]
    assert not open_to_others
    assert not of_unclean & 0o077
