"""Checkpoints: of one step, whole or not at all, over the end of the server; and everybody is told of a restore."""

import os
import signal
import threading

import numpy as np
import pytest

import optserve
from backend_under_test import BACKEND
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
    with optserve.local_server(data_dir, backend=BACKEND, options=options) as server:
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


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_restores_imports_and_checkpoints_are_there_after_the_end_of_the_server(tmp_path, client, name, ending):
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), gradient(0))
    with (
        optserve.local_server(tmp_path, backend=BACKEND) as server,
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
        optserve.local_server(tmp_path, backend=BACKEND) as server,
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
