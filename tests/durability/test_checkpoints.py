"""Checkpoints: of one step, whole or not at all, over the end of the server; and everybody is told of a restore."""

import errno
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import optserve
from durability.folder import F4, MIB, PARAMETERS, Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta, Momentum
from optserve_server.numerics.settings import Settings
from optserve_server.persistence import snapshot
from optserve_server.persistence.checkpoint_store import FolderStore, TemporaryStore
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.disk import Disk
from service.attacks import wait_until


def gradient(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((300, 50)).astype(np.float32), "b": rng.standard_normal(7)}


def bits(updates: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: update.tobytes() for name, update in updates.items()}


@pytest.fixture(params=["memory", "snapshot", "journal"])
def durable(request, tmp_path):
    """A client of a server with each kind of durability."""
    options = ["--durability", request.param]
    data_dir = None if request.param == "memory" else tmp_path / "data"
    with optserve.local_server(data_dir, backend="numba", options=options) as server:
        assert server.process.poll() is None
        with optserve.connect(server.target) as client:
            assert client.server_info().durability == request.param
            yield client


def test_a_restored_run_goes_on_with_the_same_bits(durable):
    opt = durable.create_optimizer("a", optserve.Adadelta(rho=0.9), gradient(0))
    for seed in range(3):
        opt.step(gradient(seed))
    saved = opt.save_checkpoint("three")
    first = [bits(opt.step(gradient(seed))) for seed in range(3, 6)]
    opt.update(optserve.Adadelta(rho=0.5))
    opt.step(gradient(6))
    opt.restore_checkpoint("three")
    assert opt.current_step == saved.step == 3
    assert opt.algorithm == optserve.Adadelta(rho=0.9)  # hyper-parameters are part of it
    assert [bits(opt.step(gradient(seed))) for seed in range(3, 6)] == first
    opt.restore_checkpoint("three")
    assert bits(opt.step(gradient(3))) == first[0]


def test_they_are_listed_by_age_with_step_size_and_time(durable):
    import time

    opt = durable.create_optimizer("a", optserve.Adadelta(), gradient(0))
    start = time.time()
    for tag in ("z", "y", "x"):
        opt.step(gradient(0))
        opt.save_checkpoint(tag)
    listed = opt.list_checkpoints()
    assert [(item.tag, item.step) for item in listed] == [("z", 1), ("y", 2), ("x", 3)]
    for item in listed:
        assert 2 * sum(g.nbytes for g in gradient(0).values()) < item.size_bytes < 200_000
        assert start - 1 <= item.create_time <= time.time() + 1
    opt.delete_checkpoint("y")
    assert [item.tag for item in durable.list_checkpoints("a")] == ["z", "x"]
    assert durable.list_checkpoints("nobody") == []


def test_bad_tags_are_refused_and_nothing_changes(durable):
    opt = durable.create_optimizer("a", optserve.Adadelta(), gradient(0))
    opt.step(gradient(0))
    opt.save_checkpoint("taken")
    opt.step(gradient(1))
    with pytest.raises(optserve.AlreadyExistsError, match="'taken' of 'a' already; overwrite it"):
        opt.save_checkpoint("taken")
    with pytest.raises(optserve.NotFoundError, match="no checkpoint 'unknown'"):
        opt.restore_checkpoint("unknown")
    with pytest.raises(optserve.NotFoundError):
        opt.delete_checkpoint("unknown")
    for tag in ("", ".", "..", "../a", "a/b", "/etc/passwd", "A", "ä", "a" * 65, "a\0", "a\n"):
        with pytest.raises(optserve.InvalidArgumentError):
            opt.save_checkpoint(tag)
        with pytest.raises(optserve.InvalidArgumentError):
            opt.restore_checkpoint(tag)
        with pytest.raises(optserve.InvalidArgumentError):
            opt.delete_checkpoint(tag)
    assert [item.step for item in opt.list_checkpoints()] == [1]
    assert opt.save_checkpoint("taken", overwrite=True).step == 2
    assert [item.step for item in opt.list_checkpoints()] == [2]
    opt.step(gradient(2))


def test_they_outlive_their_optimizer_but_fit_only_one_that_is_like_it(durable):
    opt = durable.create_optimizer("a", optserve.Adadelta(), gradient(0))
    opt.step(gradient(0))
    opt.save_checkpoint("kept")
    expected = bits(opt.step(gradient(1)))
    durable.delete_optimizer("a")
    other_shape = durable.create_optimizer("a", optserve.Adadelta(), {"w": np.zeros((50, 300), "f4"), "b": np.zeros(7)})
    with pytest.raises(optserve.FailedPreconditionError, match=r"'w' \[300, 50\] float32, not 'w' \[50, 300\]"):
        other_shape.restore_checkpoint("kept")
    durable.delete_optimizer("a")
    fewer = durable.create_optimizer("a", optserve.Adadelta(), {"w": np.zeros((300, 50), "f4")})
    with pytest.raises(optserve.FailedPreconditionError, match="of 2 parameters, not of 1"):
        fewer.restore_checkpoint("kept")
    durable.delete_optimizer("a")
    other_method = durable.create_optimizer("a", optserve.Adagrad(), gradient(0))
    with pytest.raises(optserve.FailedPreconditionError, match="of adadelta, not of adagrad"):
        other_method.restore_checkpoint("kept")
    other_method.step(gradient(5))
    durable.delete_optimizer("a")
    again = durable.create_optimizer("a", optserve.Adadelta(rho=0.1), gradient(0))
    again.restore_checkpoint("kept")
    assert bits(again.step(gradient(1))) == expected


def test_a_client_that_steps_on_is_told_of_a_restore_by_another(durable):
    mine = durable.create_optimizer("a", optserve.Adadelta(), gradient(0))
    mine.step(gradient(0))
    mine.save_checkpoint("one")
    theirs = durable.optimizer("a")
    theirs.restore_checkpoint("one")
    # The same step number, and yet another state than mine: one that I do not know of.
    with pytest.raises(optserve.StateReplacedError, match="was replaced by a restore, an import"):
        mine.step(gradient(1))
    with pytest.raises(optserve.StateReplacedError):
        mine.step(gradient(1))
    assert theirs.current_step == 1
    mine.refresh()
    mine.step(gradient(1))
    # Without a stream it is told as well, with both steps.
    mine.close()
    theirs.restore_checkpoint("one")
    with pytest.raises(optserve.StepsLostError, match=r"seen step 2 of 'a'; the server is at step 1"):
        mine.step(gradient(2))
    mine.refresh()
    mine.close()
    theirs.step(gradient(1))
    theirs.restore_checkpoint("one")
    with pytest.raises(optserve.StateReplacedError, match="Call refresh"):
        mine.step(gradient(1))


def test_a_new_optimizer_of_the_same_name_is_not_taken_for_the_old_one(durable):
    mine = durable.create_optimizer("a", optserve.Adadelta(), gradient(0))
    mine.step(gradient(0))
    mine.close()
    durable.delete_optimizer("a")
    theirs = durable.create_optimizer("a", optserve.Adadelta(), gradient(0))
    theirs.step(gradient(5))
    with pytest.raises(optserve.StateReplacedError):
        mine.step(gradient(1))


def test_a_checkpoint_is_of_one_step_while_others_step(durable):
    """Each step adds the same number everywhere; a copy that mixes steps has two values in it."""
    size = 3_000_000
    opt = durable.create_optimizer("a", optserve.Adagrad(), {"x": optserve.TensorSpec((size,))})
    ones, stop = {"x": np.ones(size, np.float32)}, threading.Event()
    stepper = durable.optimizer("a")

    def keep_stepping() -> None:
        while not stop.is_set():
            stepper.step(ones)

    def wait_for_steps() -> None:
        """Until others have stepped since the last look was taken."""
        target = stepper.current_step + 2
        wait_until(lambda: stepper.current_step >= target, 60)

    def save(tag: str) -> int:
        wait_for_steps()
        return opt.save_checkpoint(tag).step

    thread = threading.Thread(target=keep_stepping)
    thread.start()
    try:
        steps = [save(f"c{turn}") for turn in range(4)]
        wait_for_steps()
        exported = opt.export_state()
    finally:
        stop.set()
        thread.join()
    assert len({*steps, exported.step}) == 5  # otherwise nobody has stepped, and this shows nothing
    assert np.all(exported.slots["x"]["sum"] == exported.step)
    for turn, saved in enumerate(steps):
        opt.restore_checkpoint(f"c{turn}")
        assert np.all(opt.export_state().slots["x"]["sum"] == saved)


# --- Over the end of the server


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_restores_imports_and_checkpoints_are_there_after_the_end_of_the_server(tmp_path, client, name, ending):
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), gradient(0))
    with (
        optserve.local_server(tmp_path, backend="numba") as server,
        optserve.connect(server.target) as before,
    ):
        opt = before.create_optimizer("a", optserve.Adadelta(), gradient(0))
        for each in (undisturbed, opt):
            each.step(gradient(0))
            each.save_checkpoint("one")
            each.step(gradient(1))
            each.restore_checkpoint("one")
            each.step(gradient(2))
            each.import_state(each.export_state())
            each.update(optserve.Adadelta(rho=0.3))
            last = each.step(gradient(3))
        os.kill(server.process.pid, ending)
        server.process.wait(30)
    with (
        optserve.local_server(tmp_path, backend="numba") as server,
        optserve.connect(server.target) as after,
    ):
        opt = after.optimizer("a")
        assert opt.current_step == undisturbed.current_step == 3
        assert bits(opt.replay()) == bits(last)
        assert bits(opt.step(gradient(4))) == bits(undisturbed.step(gradient(4)))
        for each in (undisturbed, opt):
            each.restore_checkpoint("one")
        assert bits(opt.step(gradient(5))) == bits(undisturbed.step(gradient(5)))
        assert not list((tmp_path / "checkpoints").glob("*.tmp"))


# --- Below the network


@pytest.fixture
def folder(tmp_path):
    server = Server(tmp_path)
    yield server, Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints"), max_checkpoints=3)
    server.die()


def test_a_restore_while_a_snapshot_is_being_written(tmp_path, monkeypatch, folder):
    server, checkpoints = folder
    item = server.create()
    for index in range(3):
        step(item, index)
    checkpoints.save("a", "three")
    step(item, 3)
    real = snapshot._stretches

    def stretches(layout):
        for position, stretch in enumerate(real(layout)):
            yield stretch
            if position == 0:
                checkpoints.restore("a", "three")
            step(item, 10 + position)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_stretches", stretches)
        server.folder.snapshot()
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


def test_names_that_look_like_leftovers_are_no_leftovers(tmp_path):
    for name in ("model.tmp", "a"):
        server = Server(tmp_path)
        checkpoints = Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints"), 9)
        server.create(name)
        checkpoints.save(name, "x.tmp")
        assert [item.tag for item in checkpoints.page("model.tmp", 9, "")[0]] == ["x.tmp"]
        (tmp_path / "checkpoints" / ".new-abc").write_text("of a dead server")
        server.die()
    FolderStore(tmp_path / "checkpoints")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["a", "model.tmp"]


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


def test_a_checkpoint_from_before_a_hyperparameter_is_restored_with_its_default(folder, monkeypatch):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    before = {"rule": {"name": "adadelta", "rho": 0.5}}
    assert item.settings.to_json() != before
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "to_json", lambda _settings: before)
        checkpoints.save("a", "old")
    checkpoints.restore("a", "old")
    assert item.rule == Adadelta(rho=0.5)


def test_only_a_few_states_are_under_way_at_a_time(folder):
    from contextlib import ExitStack

    from optserve_server.persistence.checkpoints import MAX_TRANSFERS

    server, checkpoints = folder
    item = server.create()
    with ExitStack() as stack:
        for turn in range(MAX_TRANSFERS):
            stack.enter_context(checkpoints.exported(item) if turn % 2 else checkpoints.staging(item))
        with pytest.raises(OptserveError) as caught:
            checkpoints.save("a", "one")
        assert caught.value.reason is Reason.TOO_MANY_STREAMS
        assert caught.value.retry_after_s
    checkpoints.save("a", "one")


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


def test_a_damaged_file_is_said_and_restores_nothing(tmp_path, folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    path = tmp_path / "checkpoints/a/one.safetensors"
    intact = path.read_bytes()
    before = fingerprint(item)
    head = 8 + int.from_bytes(intact[:8], "little")
    damages = [
        intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :] for at in (*range(0, head, 7), head, len(intact) - 1)
    ]
    for content in [*damages, intact[:-1], intact[:100], b"", b"{}"]:
        path.write_bytes(content)
        with pytest.raises(OptserveError) as caught:
            checkpoints.restore("a", "one")
        assert caught.value.reason in (Reason.CHECKPOINT_DAMAGED, Reason.CHECKPOINT_MISMATCH)
        assert fingerprint(item) == before
    assert checkpoints.page("a", 10, "")[0] == []
    path.write_bytes(intact)
    checkpoints.restore("a", "one")


def test_a_damaged_file_can_be_replaced_and_deleted(tmp_path, folder):
    server, checkpoints = folder
    server.create()
    checkpoints.save("a", "one")
    path = tmp_path / "checkpoints/a/one.safetensors"
    path.write_bytes(b"damage")
    checkpoints.save("a", "one", overwrite=True, request_id="x")
    checkpoints.restore("a", "one")
    path.write_bytes(b"damage")
    checkpoints.delete("a", "one")
    assert not path.exists()


def test_a_checkpoint_of_a_newer_format_is_refused(folder, monkeypatch):
    server, checkpoints = folder
    server.create()
    with monkeypatch.context() as patch:
        patch.setattr("optserve_server.persistence.state_file.FORMAT_VERSION", 2)
        checkpoints.save("a", "one")
    with pytest.raises(OptserveError, match="it has format 2"):
        checkpoints.restore("a", "one")


def test_their_number_is_bounded(folder):
    server, checkpoints = folder
    server.create()
    for tag in "abc":
        checkpoints.save("a", tag)
    with pytest.raises(OptserveError) as caught:
        checkpoints.save("a", "d")
    assert caught.value.reason is Reason.SERVER_FULL
    checkpoints.save("a", "c", overwrite=True)
    assert [item.tag for item in checkpoints.page("a", 2, "")[0]] == ["a", "b"]
    assert checkpoints.page("a", 2, "")[1]
    (rest,), more = checkpoints.page("a", 2, checkpoints.page("a", 2, "")[0][-1].sort_key)
    assert (rest.tag, more) == ("c", "")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_refuses_a_checkpoint_and_leaves_nothing(tmp_path, folder, monkeypatch, call):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    before = fingerprint(item)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OptserveError, match="No space left") as caught:
            checkpoints.save("a", "one")
    assert caught.value.reason is Reason.NOT_DURABLE
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert fingerprint(item) == before
    checkpoints.save("a", "one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OptserveError, match="No space left"):
            checkpoints.restore("a", "one")
    assert fingerprint(item) == before


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


def test_temporary_checkpoints_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    server = Server(tmp_path / "data")
    item = server.create()
    checkpoints = Checkpoints(server.optimizers, TemporaryStore(), 3)
    step(item, 0)
    checkpoints.save("a", "one")
    assert not list((tmp_path / "tmp").iterdir())
    threads = [threading.Thread(target=checkpoints.page, args=("a", 10, "")) for _ in range(8)]
    for thread in threads:
        thread.start()
    checkpoints.restore("a", "one")
    for thread in threads:
        thread.join()
    assert not list((tmp_path / "tmp").iterdir())
    checkpoints.delete("a", "one")
    assert checkpoints.page("a", 10, "") == ([], "")
    server.die()


def test_optimizers_of_any_rule_and_layout_can_be_saved(folder):
    server, checkpoints = folder
    for position, (rule, parameters) in enumerate(
        [
            (Momentum(), PARAMETERS),
            (Adadelta(), (Parameter("odd", (3,), F4), Parameter("b", (5,), np.dtype("f8")))),
            (Adadelta(), (Parameter("nothing", (0, 4), F4),)),
            (Adadelta(), (Parameter("ä.b c", (), F4), Parameter("ä.b", (), F4))),
        ]
    ):
        name = f"o{position}"
        item = server.optimizers.create(name, Layout(parameters), Settings(rule))
        under_way = item.steps.begin(StepRequest("request"))
        for tensor, parameter in enumerate(parameters):
            under_way.stage(tensor, 0, np.full(parameter.size, 0.5, parameter.dtype).tobytes())
        under_way.commit()
        b"".join(under_way.reply(MIB, lambda piece: bytes(piece.data)))
        under_way.close()
        checkpoints.save(name, "x")
        slots = fingerprint(item)[-1]
        checkpoints.restore(name, "x")
        assert fingerprint(item)[-1] == slots
