"""A call about a checkpoint that is made again is known, and its request id stands for nothing else."""

import errno
from pathlib import Path

import pytest

from durability.folder import Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.persistence.checkpoint_store import FolderStore
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.disk import Disk


def test_a_retry_neither_saves_nor_restores_twice(folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    first = checkpoints.save("a", "one", request_id="save")
    step(item, 1)
    assert checkpoints.save("a", "one", request_id="save") == first
    assert checkpoints.save("a", "one", request_id="save", overwrite=True) == first
    checkpoints.restore("a", "one", request_id="restore")
    step(item, 2)
    checkpoints.restore("a", "one", request_id="restore")
    assert item.steps.step == 2


def test_a_retry_is_known_whatever_has_happened_since(folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    checkpoints.restore("a", "one", request_id="first")
    for request_id in ("second", ""):
        step(item, 1)
        checkpoints.restore("a", "one", request_id=request_id)
    step(item, 1)
    checkpoints.delete("a", "one")
    checkpoints.restore("a", "one", request_id="first")
    assert item.steps.step == 2


def test_a_request_id_stands_for_what_it_was_sent_with(tmp_path, folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    step(item, 1)
    checkpoints.save("a", "two")
    checkpoints.restore("a", "one", request_id="restore")

    def check(server: Server, checkpoints: Checkpoints) -> None:
        before = fingerprint(server.optimizers.get("a"))
        with pytest.raises(OptserveError, match="was used for a restore of checkpoint 'one', not for") as caught:
            checkpoints.restore("a", "two", request_id="restore")
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
        optimizer = server.optimizers.get("a")
        with (
            checkpoints.staging(optimizer) as state,
            pytest.raises(OptserveError, match="an import of a state of step 1"),
        ):
            checkpoints.put(optimizer, 1, state, lambda present, _: present, request_id="restore")
        checkpoints.restore("a", "one", request_id="restore")
        assert fingerprint(server.optimizers.get("a")) == before

    check(server, checkpoints)
    server.die()
    for _ in ("from the journal", "from a snapshot"):
        again = Server(tmp_path)
        check(again, Checkpoints(again.optimizers, FolderStore(tmp_path / "checkpoints"), 3))
        again.folder.snapshot()
        again.die()


def test_a_retry_of_a_restore_is_known_after_a_crash(tmp_path, folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    checkpoints.restore("a", "one", request_id="restore")
    step(item, 1)
    server.die()
    for _ in ("from the journal", "from a snapshot"):
        again = Server(tmp_path)
        Checkpoints(again.optimizers, FolderStore(tmp_path / "checkpoints"), 3).restore(
            "a", "one", request_id="restore"
        )
        assert again.optimizers.get("a").steps.step == 2
        again.folder.snapshot()
        again.die()


class DiskThatForgetsNames(Disk):
    """Folders are not made durable while it fails."""

    def __init__(self) -> None:
        self.fails = True
        self.synced = []

    def sync_path(self, path: Path) -> None:
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")
        self.synced.append(path)
        super().sync_path(path)


def test_a_name_that_could_not_be_made_durable_is_made_so_by_the_retry(tmp_path, folder):
    server, _ = folder
    server.create()
    disk = DiskThatForgetsNames()
    checkpoints = Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints", disk=disk), max_checkpoints=3)
    for _ in range(2):
        with pytest.raises(OptserveError, match="Input/output error"):
            checkpoints.save("a", "one", request_id="save")
    disk.fails = False
    checkpoints.save("a", "one", request_id="save")
    assert disk.synced == [tmp_path / "checkpoints/a", tmp_path / "checkpoints", tmp_path]
    disk.fails = True
    with pytest.raises(OptserveError, match="Input/output error"):
        checkpoints.delete("a", "one")
