"""A server with a data folder: what it keeps over its end, and what it says when it cannot."""

import contextlib
import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import optserve
from durability.folder import MIB, Server, fingerprint, step
from optserve_server.persistence import journal, snapshot
from optserve_server.persistence.data_folder import DataFolder
from optserve_server.persistence.disk import Disk


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
        pytest.raises(optserve.UnavailableError, match="cannot be used: it is not a folder"),
        optserve.local_server(tmp_path / "file", backend="numpy"),
    ):
        pass
