"""Snapshots, written while steps go on: what they contain, and what a failure leaves of them."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

import optserve
from durability.folder import F4, MIB, PARAMETERS, BusyDisk, Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta, Momentum
from optserve_server.numerics.settings import Settings
from optserve_server.persistence import journal, snapshot
from optserve_server.persistence.disk import Disk
from present import present


def full(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", [None, "value", "norm", "global_norm"])
def test_a_snapshot_whose_pieces_are_of_different_steps_comes_back_to_the_last_one(tmp_path, kind):
    """Steps, a change of rho and a partial step happen while the snapshot is being written.

    What is clipped in a piece depends on the whole tensor, or on the whole step.
    """
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    clipping = Clipping(kind, 0.5) if kind else None
    item = server.optimizers.create("a", Layout(PARAMETERS), Settings(Adadelta(), clipping=clipping), "creation")
    for index in range(3):
        step(item, index)
    turn = iter(range(3, 100))

    def act(number: int) -> None:
        step(item, next(turn), (0,) if number % 2 else ())
        if number == 4:
            server.optimizers.update("a", lambda _before, _layout: Settings(Adadelta(rho=0.7), clipping=clipping))

    disk.act = act
    path = server.folder.snapshot()
    _, (saved,) = snapshot.read(path)
    assert len({piece.lsn for piece in saved.pieces}) > 3  # otherwise this shows nothing
    reply = step(item, next(turn))
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    item = again.optimizers.get("a")
    assert fingerprint(item) == before
    replayed = item.steps.begin(StepRequest(item.steps.main.last_request_id))
    replayed.commit()
    assert b"".join(replayed.reply(MIB, lambda piece: bytes(piece.data))) == reply
    replayed.close()
    again.die()


def test_a_reply_that_was_being_overwritten_during_a_snapshot_is_not_promised_after_it(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    step(item, 0)
    under_way = item.steps.begin(StepRequest("request-1"))
    under_way.stage(1, 0, bytes(88))
    server.folder.snapshot()
    server.die()
    again = Server(tmp_path)
    with pytest.raises(OptserveError) as caught:
        again.optimizers.get("a").steps.begin(StepRequest("request-0"))
    assert caught.value.reason is Reason.REPLY_GONE
    again.die()


class DiskOfNewFiles(Disk):
    """Lets something happen before the first file of a snapshot is made."""

    act: Callable[[], object] | None = None

    def create(self, path: Path) -> BinaryIO:
        if self.act is not None and path.name == "0000.safetensors":
            self.act()
        return super().create(path)


@pytest.mark.parametrize("moment", ["before the list of optimizers", "before the first of them"])
def test_deleted_and_created_anew_during_a_snapshot(tmp_path, monkeypatch, moment):
    """With other parameters and another method: what the journal says of the old one must not touch the new one."""
    disk = DiskOfNewFiles()
    server = Server(tmp_path, disk=disk)
    step(server.create("a"), 0)
    old = server.create("b")
    step(old, 0)
    settled = Optimizers.settled

    def change():
        step(old, 1, (0, 1))
        server.optimizers.delete("b")
        server.optimizers.create("b", Layout((Parameter("w", (3, 7), F4),)), Settings(Momentum()), "creation")
        server.create("c")

    with monkeypatch.context() as patch:
        if moment == "before the list of optimizers":
            patch.setattr(Optimizers, "settled", lambda optimizers: (change(), settled(optimizers))[1])
        else:
            disk.act = change
        server.folder.snapshot()
    before = {name: fingerprint(server.optimizers.get(name)) for name in "abc"}
    server.die()
    again = Server(tmp_path)
    assert {name: fingerprint(again.optimizers.get(name)) for name in "abc"} == before
    assert len(again.optimizers) == 3
    again.die()


def test_deleted_in_the_middle_of_its_snapshot(tmp_path):
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    step(server.create("a"), 0)
    step(server.create("b"), 0)
    # When its first piece is copied, and others are not.
    disk.act = lambda number: server.optimizers.delete("a") if number == 1 else None
    server.folder.snapshot()
    before = fingerprint(server.optimizers.get("b"))
    server.die()
    again = Server(tmp_path)
    assert len(again.optimizers) == 1
    assert fingerprint(again.optimizers.get("b")) == before
    again.die()


def test_a_death_just_before_a_snapshot_gets_its_name_loses_nothing(tmp_path, monkeypatch):
    """Also where nothing has changed since the one before, whose name it would be."""
    server = Server(tmp_path)
    item = server.create()
    step(item, 0)
    before = fingerprint(item)
    server.folder.snapshot()

    class Death(BaseException):
        pass

    def die(*_arguments):
        raise Death

    for call in ("rename", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, call, die)
            with contextlib.suppress(Death):
                server.folder.snapshot()
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    assert len(snapshot.paths(tmp_path)) == 1
    again.die()


def test_a_snapshot_that_fails_leaves_no_file_and_is_tried_again_later(tmp_path, monkeypatch):
    server = Server(tmp_path, snapshot_bytes=3 * MIB)
    item = server.create()
    step(item, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            server.folder.snapshot()
    assert not list(tmp_path.glob("*.tmp"))
    # In the background: not at every step, and whatever the error.
    tried = threading.Semaphore(0)

    def fails(*_arguments, **_options):
        tried.release()
        raise RuntimeError("the device fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write", fails)
        server.folder.start_snapshots(lambda _in_place: None)
        for index in range(1, 5):  # 840 kB each
            step(item, index)
        assert tried.acquire(timeout=10)
        step(item, 5)
        assert not tried.acquire(timeout=0.2)
        for index in range(6, 9):
            step(item, index)
        assert tried.acquire(timeout=10)
    for index in range(9, 13):
        step(item, index)
    server.folder.close()
    assert len(snapshot.paths(tmp_path)) == 1


def test_a_snapshot_takes_the_place_of_the_journal_before_it(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(6):
        step(item, index)
    segments = len(journal.segment_paths(tmp_path))
    server.folder.snapshot()
    step(item, 6)
    server.folder.snapshot()
    assert len(snapshot.paths(tmp_path)) == 1
    assert len(journal.segment_paths(tmp_path)) < segments
    server.folder.close()


def test_a_snapshot_is_safetensors(tmp_path):
    """Read here by hand: a length, a JSON header, raw little-endian arrays."""
    server = Server(tmp_path)
    item = server.create()
    step(item, 0)
    content = (server.folder.snapshot() / "0000.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert set(header) == {f"{p.name}.{a}" for p in PARAMETERS for a in ("square_avg", "acc_delta", "update")}
    entry = header["b.square_avg"]
    assert (entry["dtype"], entry["shape"]) == ("F64", [11])
    begin, end = entry["data_offsets"]
    assert content[8 + size + begin : 8 + size + end] == item.state.slot(1, 0).tobytes()
    server.folder.close()


def test_a_snapshot_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    server = Server(tmp_path)
    server.create()
    monkeypatch.setattr(snapshot, "FORMAT_VERSION", 2)
    server.folder.snapshot()
    server.die()
    monkeypatch.undo()
    with pytest.raises(journal.JournalError, match="format 2"):
        Server(tmp_path)


def test_the_log_of_a_run_does_not_grow_with_its_snapshots(tmp_path):
    """At INFO; a fast run has one every second or two."""
    config = tmp_path / "optserve.toml"
    config.write_text("snapshot_bytes = 1_048_576\nsegment_bytes = 1_048_576\n")
    command = [sys.executable, "-P", "-m", "optserve_server", "--port", "0", "--backend", "numpy", "--announce"]
    command += ["--data-dir", str(tmp_path / "data"), "--config", str(config)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    target = present(server.stdout).readline().removeprefix("ready ").strip()
    gradients = {"w": np.ones(1 << 16, np.float32)}
    seen = set()
    with optserve.connect(target) as client:
        opt = client.create_optimizer("a", optserve.Adadelta(), gradients)
        while len(seen) < 4:
            opt.step(gradients)
            seen.update(path.name for path in snapshot.paths(tmp_path / "data"))
    server.terminate()
    _, log = server.communicate(timeout=60)
    lines = [line for line in log.splitlines() if "optserve_server" in line]
    assert "created a" in log
    assert not [line for line in lines if "snapshot-" in line]
    # backend, recovered, serving, created, SIGTERM, stopped
    assert len(lines) <= 7, log
