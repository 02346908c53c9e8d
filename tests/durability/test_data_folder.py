"""A server with a data folder: what it keeps over its end, and what it says when it cannot."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

import optserve
from durability.folder import F4, F8, MIB, PARAMETERS, BusyDisk, Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import OtherState
from optserve_server.engine.records import ArenaValues
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta, Momentum, WindowedRms
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.step_settings import Change, StepSettings
from optserve_server.persistence import journal, snapshot
from optserve_server.persistence.data_folder import DataFolder
from optserve_server.persistence.disk import Disk
from present import present


def full(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EIO])
def test_a_folder_may_be_mounted_where_folders_cannot_be_synced(tmp_path, code):
    """As in an image that is read-only; a disk that fails is another thing."""

    class Image(Disk):
        def sync_path(self, path: Path) -> None:
            if path == tmp_path:
                raise OSError(code, os.strerror(code))
            super().sync_path(path)

    (tmp_path / "mounted").mkdir()
    refused = pytest.raises(journal.JournalError, match="cannot be used") if code == errno.EIO else None
    with refused or contextlib.nullcontext():
        DataFolder(tmp_path / "mounted", snapshot_bytes=MIB, segment_bytes=MIB, disk=Image()).close(snapshot=False)


def test_everything_comes_back_bit_for_bit_without_any_snapshot(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(4):
        reply = step(item, index)
    server.optimizers.update("a", lambda before, _layout: Settings(replace(before.rule, rho=0.5)))
    reply = step(item, 4, (1,))
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    item = again.optimizers.get("a")
    assert fingerprint(item) == before
    assert again.recovered.steps == 5
    replayed = item.steps.begin(StepRequest("request-4", 4))
    assert replayed.commit().replayed
    assert b"".join(replayed.reply(MIB, lambda piece: bytes(piece.data))) == reply
    replayed.close()
    assert again.create() is item  # a retried creation finds what it made
    again.die()


@pytest.mark.parametrize("kind", ["value", "norm", "global_norm"])
def test_what_was_clipped_is_clipped_again_also_behind_an_empty_parameter_of_another_dtype(tmp_path, kind):
    server = Server(tmp_path)
    layout = Layout((PARAMETERS[1], Parameter("first", (3,), F4), PARAMETERS[2], Parameter("last", (5,), F8)))
    item = server.optimizers.create("a", layout, Settings(Adadelta(), clipping=Clipping(kind, 0.1)))
    step(item, 0)
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


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


@pytest.mark.parametrize(
    ("settings", "own", "change"),
    [
        pytest.param(
            Settings(Adadelta(), groups=(Group((0,), {"learning_rate": 0.5}),)),
            Change(1, {"learning_rate": 0.25}),
            lambda settings: replace(settings, groups=()),
            id="the group is removed",
        ),
        pytest.param(
            Settings(WindowedRms(eps=0.0, outer_eps=1e-8)),
            Change(None, {"eps": 0.0}),
            lambda settings: replace(settings, rule=replace(settings.rule, eps=1e-8, outer_eps=0.0)),
            id="the settings exclude each other",
        ),
    ],
)
def test_settings_that_fit_no_longer_are_no_obstacle_if_the_snapshot_contains_their_step(
    tmp_path, settings, own, change
):
    """The step and the update happen between the snapshot's LSN and the description of their optimizer."""
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    server.create("a")
    item = server.optimizers.create("b", Layout(PARAMETERS), settings, "creation")

    def act(number: int) -> None:
        if number == 1:
            step(item, 0, settings=StepSettings((own,)))
            server.optimizers.update("b", lambda before, _layout: change(before))

    disk.act = act
    server.folder.snapshot()
    disk.act = None
    step(item, 1)
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("b")) == before
    again.die()


def test_minus_0_in_the_settings_of_a_step_is_0_before_and_after_a_kill(tmp_path):
    """The server that goes on has made a step with 0 before; the one that comes back begins after that."""
    server = Server(tmp_path)
    item = server.optimizers.create("a", Layout(PARAMETERS), Settings(Momentum()), "creation")

    def own(zero: float) -> StepSettings:
        return StepSettings((Change(None, {"rho": zero, "learning_rate": zero}),))

    step(item, 0, settings=own(0.0))
    step(item, 1)
    server.folder.snapshot()
    step(item, 2, settings=own(-0.0))
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
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


def test_damage_is_refused_with_the_file_and_the_place(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(3):
        step(item, index)
    server.die()
    intact = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    (first, *_) = journal.segment_paths(tmp_path)
    content = bytearray(first.read_bytes())
    content[200_000] ^= 1
    first.write_bytes(content)
    with pytest.raises(journal.CorruptionError, match=f"{first.name} is damaged at byte"):
        Server(tmp_path)
    server = Server(intact)
    path = server.folder.snapshot()
    server.die()
    file = path / "0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(journal.JournalError, match=r"0000.safetensors is damaged around element"):
        Server(intact)


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


def test_a_server_that_stops_and_starts_goes_on(tmp_path, client, name):
    g = {"x": np.random.default_rng(0).standard_normal(10_000).astype(np.float32)}
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), g)
    for turn in range(3):
        with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as durable:
            assert durable.server_info().durability == "journal"
            if turn == 0:
                durable.create_optimizer("a", optserve.Adadelta(), g)
            opt = durable.optimizer("a")
            assert opt.current_step == 2 * turn
            for _ in range(2):
                assert opt.step(g)["x"].tobytes() == undisturbed.step(g)["x"].tobytes()
    # A server that stops in order leaves a snapshot and an empty journal.
    assert len(snapshot.paths(tmp_path)) == 1
    assert [record.lsn for record in journal.Reader(tmp_path, snapshot.read(snapshot.paths(tmp_path)[0])[0])] == []


def test_optimizers_that_are_stepped_at_the_same_time_do_not_wait_for_each_other(tmp_path):
    server = Server(tmp_path)
    items = [server.create(name) for name in "abcd"]

    def keep_stepping(item) -> int:
        for index in range(60):
            step(item, index, (1,))
        return item.steps.step

    with ThreadPoolExecutor(4) as pool:
        assert [future.result(timeout=60) for future in [pool.submit(keep_stepping, item) for item in items]] == [
            60
        ] * 4
    before = [fingerprint(item) for item in items]
    server.die()
    again = Server(tmp_path)
    assert [fingerprint(again.optimizers.get(name)) for name in "abcd"] == before
    again.die()


def test_a_second_server_on_the_same_folder_is_refused(tmp_path):
    with (
        optserve.local_server(tmp_path, backend="numpy"),
        pytest.raises(optserve.UnavailableError, match="Another server uses the data folder"),
        optserve.local_server(tmp_path, backend="numpy"),
    ):
        pass


def test_a_folder_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(optserve.UnavailableError, match="Invalid value for '--data-dir'"),
        optserve.local_server(tmp_path / "file", backend="numpy"),
    ):
        pass


def test_a_snapshot_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    server = Server(tmp_path)
    server.create()
    monkeypatch.setattr(snapshot, "FORMAT_VERSION", 2)
    server.folder.snapshot()
    server.die()
    monkeypatch.undo()
    with pytest.raises(journal.JournalError, match="format 2"):
        Server(tmp_path)


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from optserve.cli import main; main()", "journal", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_journal_is_verified_counted_and_repaired_by_command(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(3):
        step(item, index)
    busy = tool("verify", tmp_path)
    assert busy.returncode == 1
    assert "Another server uses" in busy.stderr
    server.die()
    assert "good: snapshot at 0, then 4 records" in tool("verify", tmp_path).stdout
    assert " 3 " in tool("stats", tmp_path).stdout
    verified, counted = (json.loads(tool(what, tmp_path, "--json").stdout) for what in ("verify", "stats"))
    assert list(verified) == ["snapshot_lsn", "next_lsn", "bytes_read", "records", "torn"]
    assert (verified["snapshot_lsn"], verified["next_lsn"], verified["records"], verified["torn"]) == (0, 5, 4, None)
    assert list(counted) == ["snapshot_lsn", "next_lsn", "bytes_read", "optimizers"]
    kinds = {
        "creations": 1,
        "updates": 0,
        "deletions": 0,
        "steps": 3,
        "replaced_states": 0,
        "uploads": 0,
        "additions": 0,
    }
    assert counted["optimizers"] == [{"name": "a", **kinds}]
    assert "nothing to repair" in tool("repair", tmp_path).stdout
    # Damage within the second step.
    *_, second, _ = journal.Reader(tmp_path, 0)
    with second.path.open("r+b") as file:
        file.seek(second.offset + 5000)
        file.write(b"damage")
    damaged = tool("verify", tmp_path)
    assert damaged.returncode == 1
    assert f"{second.path.name} is damaged at byte {second.offset}" in damaged.stderr
    assert f"optserve journal repair {tmp_path}" in damaged.stderr
    assert "truncated" in tool("repair", tmp_path, "--yes").stdout
    lineage = item.steps.lineage
    for _ in ("steps were lost", "and that is remembered"):
        again = Server(tmp_path)
        assert again.optimizers.get("a").steps.step == 1
        assert again.optimizers.get("a").steps.lineage != item.steps.lineage
        again.die()
    assert lineage == item.steps.lineage


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
