"""A state that takes the place of another: among steps and snapshots, and over a crash."""

import threading

import pytest

from durability.folder import BusyDisk, Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import StepRequest
from optserve_server.persistence import snapshot
from optserve_server.persistence.checkpoint_store import FolderStore
from optserve_server.persistence.checkpoints import Checkpoints


def test_a_restore_while_a_snapshot_is_being_written(tmp_path):
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    checkpoints = Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints"), max_checkpoints=3)
    item = server.create()
    for index in range(3):
        step(item, index)
    checkpoints.save("a", "three")
    step(item, 3)

    def act(number: int) -> None:
        # When the first piece is copied.
        if number == 1:
            checkpoints.restore("a", "three")
        step(item, 10 + number)

    disk.act = act
    path = server.folder.snapshot()
    _, (saved,) = snapshot.read(path)
    assert len({piece.lsn for piece in saved.pieces}) > 3  # otherwise this shows nothing
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


def test_nobody_is_cut_off_in_the_middle_of_a_step(folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    under_way = item.steps.begin(StepRequest("mine"))
    assert checkpoints.save("a", "two").step == 1  # what is staged is no part of it
    with pytest.raises(OptserveError) as caught:
        checkpoints.restore("a", "one")
    assert caught.value.reason is Reason.STEP_IN_PROGRESS
    assert caught.value.retry_after_s
    under_way.close()
    checkpoints.restore("a", "one")


def test_a_restore_comes_between_two_steps_of_a_client_that_makes_no_pause(folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    lineages = {item.steps.lineage}
    for turn in range(10):
        under_way = item.steps.begin(StepRequest(f"first-{turn}"))
        restoring = threading.Thread(target=checkpoints.restore, args=("a", "one"))
        restoring.start()
        while restoring.is_alive():
            under_way.close()
            under_way = item.steps.begin(StepRequest(f"next-{turn}"))
        under_way.close()
        lineages.add(item.steps.lineage)
        assert len(lineages) == turn + 2
    step(item, 1)


def test_a_restore_that_was_the_last_thing_leaves_no_reply_after_a_crash(tmp_path, folder):
    """The reply of the step before it belongs to a state that is gone."""
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    step(item, 1)
    checkpoints.restore("a", "one")
    before = fingerprint(item)
    assert item.steps.main.retained is None
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


def test_a_state_that_a_device_has_lost_is_mended_by_a_restore_and_survives_a_restart(tmp_path, folder, monkeypatch):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    reply = step(item, 1)

    def fails(*_arguments):
        raise RuntimeError("the device fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(type(item.state), "apply", fails)
        with pytest.raises(OptserveError) as caught:
            step(item, 2)
    assert caught.value.reason is Reason.STATE_LOST
    for use in (lambda: step(item, 3), lambda: checkpoints.save("a", "two"), server.folder.snapshot):
        # A snapshot without it would take the journal's place, which can bring it back.
        with pytest.raises(OptserveError) as caught:
            use()
        assert caught.value.reason is Reason.STATE_LOST
    checkpoints.restore("a", "one")
    assert step(item, 1) == reply
    before = fingerprint(item)
    server.folder.snapshot()
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()
