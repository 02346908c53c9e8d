"""Durability by snapshots alone: what is lost is what came after the last one, and that is said."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import optserve
from backend_under_test import BACKEND
from durability.folder import Server, fingerprint, step
from optserve_server.persistence import journal, snapshot


def gradient(step: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(step).standard_normal((700, 900)).astype(np.float32)}


def snapshots_after(lsn: int, folder: Path) -> list[Path]:
    return [path for path in snapshot.paths(folder) if int(path.name.split("-")[1]) > lsn]


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "optserve.toml"
    path.write_text('durability = "snapshot"\nsnapshot_interval_s = 0.05\n')
    return ["--config", str(path)]


def test_a_killed_server_comes_back_at_a_step_that_it_was_at_with_all_its_bits(tmp_path, client, name, options):
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), gradient(0))
    replies = []
    with (
        optserve.local_server(tmp_path / "data", backend=BACKEND, options=options) as server,
        optserve.connect(server.target) as lossy,
    ):
        opt = lossy.create_optimizer("a", optserve.Adadelta(), gradient(0))
        # Until a snapshot of some later step is there, and then some more.
        while len(replies) < 5 or not snapshots_after(4, tmp_path / "data"):
            replies.append(opt.step(gradient(len(replies)))["w"].tobytes())
            undisturbed.step(gradient(len(replies) - 1))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with (
        optserve.local_server(tmp_path / "data", backend=BACKEND, options=options) as server,
        optserve.connect(server.target) as again,
    ):
        recovered = again.optimizer("a")
        at = recovered.current_step
        assert 3 <= at <= len(replies)
        # The steps after it once more: the same bits, so what came back is the state of one step.
        for later in range(at, len(replies)):
            assert recovered.step(gradient(later))["w"].tobytes() == replies[later]
        assert recovered.step(gradient(777))["w"].tobytes() == undisturbed.step(gradient(777))["w"].tobytes()


def test_a_client_is_told_of_what_was_lost(tmp_path, options):
    path = tmp_path / "rare.toml"
    path.write_text('durability = "snapshot"\nsnapshot_interval_s = 3600\n')
    with optserve.local_server(tmp_path / "data", options=["--config", str(path)]) as server:
        port = server.target.rpartition(":")[2]
        client = optserve.connect(server.target)
        opt = client.create_optimizer("a", optserve.Adadelta(), gradient(0))
        opt.save_checkpoint("zero")
        for index in range(3):
            opt.step(gradient(index))
        # A creation is written down soon, not after an hour.
        while not snapshot.paths(tmp_path / "data"):
            client.server_info()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with optserve.local_server(tmp_path / "data", options=["--config", str(path), "--port", port]):
        with pytest.raises(optserve.StepsLostError, match=r"seen step 3 of 'a'; the server is at step \d"):
            opt.step(gradient(3))
        opt.refresh()
        assert [item.tag for item in opt.list_checkpoints()] == ["zero"]
        opt.step(gradient(3))
    client.close()


def test_an_orderly_stop_loses_nothing(tmp_path, options):
    with (
        optserve.local_server(tmp_path / "data", options=options) as server,
        optserve.connect(server.target) as client,
    ):
        last = client.create_optimizer("a", optserve.Adadelta(), gradient(0)).step(gradient(0))
    with (
        optserve.local_server(tmp_path / "data", options=options) as server,
        optserve.connect(server.target) as client,
    ):
        assert client.optimizer("a").replay()["w"].tobytes() == last["w"].tobytes()


def test_a_state_that_may_have_lost_steps_is_another_one(tmp_path):
    """A client at step 3 must not go on where somebody else has come to step 3 by another way."""
    server = Server(tmp_path, interval_s=3600)
    item = server.create()
    step(item, 0)
    server.folder.snapshot()
    step(item, 1)
    lineage = item.steps.lineage
    server.die()
    server = Server(tmp_path, interval_s=3600)
    again = server.optimizers.get("a")
    assert again.steps.step == 1
    assert again.steps.lineage != lineage
    # After an orderly stop it is the same one.
    lineage = again.steps.lineage
    server.folder.close()
    server = Server(tmp_path, interval_s=3600)
    assert server.optimizers.get("a").steps.lineage == lineage
    # A journal does not make a loss undone that was before it.
    server.die()
    server = Server(tmp_path)
    assert server.optimizers.get("a").steps.lineage != lineage
    server.die()


def test_a_folder_may_change_its_durability(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(3):
        step(item, index)
    before = fingerprint(item)
    server.die()
    # A journal's folder without a journal: it is recovered, put into a snapshot and removed.
    server = Server(tmp_path, interval_s=3600)
    assert fingerprint(server.optimizers.get("a")) == before
    assert not journal.segment_paths(tmp_path)
    server.die()
    server = Server(tmp_path, interval_s=3600)
    item = server.optimizers.get("a")
    assert fingerprint(item)[-1] == before[-1]
    step(item, 3)
    server.folder.snapshot()
    step(item, 4)
    server.die()
    # And back: numbers go on, so nothing of the journal is taken for known.
    for index in (4, 5, 6):
        server = Server(tmp_path)
        item = server.optimizers.get("a")
        assert item.steps.step == index
        step(item, index)
        before = fingerprint(item)
        server.die()
    server = Server(tmp_path)
    assert fingerprint(server.optimizers.get("a")) == before
    server.die()
