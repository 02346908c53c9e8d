"""Tensors through memory that is shared with the server: the same bits, whatever happens to either side."""

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import optserve
from backend_under_test import BACKEND, BACKENDS
from optserve._common import sysv
from optserve.v1 import steps_pb2
from optserve_server.app import App
from optserve_server.domain.config import ServerConfig
from service.wire_client import begin, chunk, commit, create, details, stream

SHAPES = {"w": ((300, 401), "float32"), "b": ((33,), "float64"), "scale": ((), "float32"), "none": ((0, 2), "float32")}
PATIENT = optserve.ClientConfig(initial_backoff_s=0.02, max_backoff_s=0.1, step_timeout_s=60)


def gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, (shape, dtype) in SHAPES.items()}


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def segments(process: int) -> list[list[str]]:
    """The System V segments that a process has made."""
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return [line for line in lines if int(line[4]) == process]


@pytest.fixture
def reference(client, name):
    client.create_optimizer(f"{name}-grpc", optserve.Adadelta(), gradients(0))
    return client.optimizer(f"{name}-grpc", transport="grpc")


@pytest.fixture(params=["memory", "journal"])
def machine(request, tmp_path):
    """A server whose staging buffer is the segment, and one that copies from it and to it."""
    data_dir = tmp_path / "data" if request.param == "journal" else None
    with optserve.local_server(data_dir, backend=BACKEND) as server:
        yield server


@pytest.fixture
def near(machine):
    with optserve.connect(machine.target, PATIENT) as client:
        yield client


def test_the_bits_are_those_of_the_stream(near, reference):
    near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    opt = near.optimizer("a", transport="shm")
    for seed in range(3):
        assert bits(opt.step(gradients(seed))) == bits(reference.step(gradients(seed)))
    some = {"b": gradients(3)["b"], "scale": gradients(3)["scale"]}
    assert bits(opt.step(some, partial=True)) == bits(reference.step(some, partial=True))
    out = {name: np.full_like(g, np.nan) for name, g in gradients(0).items()}
    opt.step(gradients(4), out=out)
    assert bits(out) == bits(reference.step(gradients(4)))
    assert bits(opt.replay()) == bits(out)
    assert opt.transport == ("shm", "the server is on this host")
    assert reference.transport == ("grpc", "shared memory was not asked for")


@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("transport", ["shm", "auto"])
def test_who_comes_right_after_another_object_was_dropped_or_closed_shares_memory(near, transport, dropped):
    near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    for seed in range(8):
        opt = near.optimizer("a", transport=transport)
        opt.step(gradients(seed))
        assert opt.transport[0] == "shm"
        if dropped:
            del opt
        else:
            opt.close()


def test_buffers_are_fresh_where_a_user_has_made_another_kind_of_array_of_one(near):
    near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    opt = near.optimizer("a", transport="shm")
    arrays = opt.buffers()
    assert all(array is opt.buffers()[name] for name, array in arrays.items())
    arrays["w"].flags.writeable = False
    arrays["b"].dtype = np.uint8
    again = opt.buffers()
    for name, gradient in gradients(0).items():
        np.copyto(again[name], gradient)
    assert again["b"].dtype == gradients(0)["b"].dtype
    assert opt.step(again, out=again)["w"] is again["w"]


def test_who_must_share_what_another_has_is_told_after_a_moment(near):
    near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    holder = near.optimizer("a", transport="shm")
    holder.step(gradients(0))
    with pytest.raises(optserve.FeatureUnavailableError, match="another client uses the segment"):
        near.optimizer("a", transport="shm").step(gradients(1), timeout_s=60)
    holder.step(gradients(1))


def test_auto_takes_it_on_this_host_and_the_stream_elsewhere(server, name, monkeypatch):
    with optserve.connect(server.target) as client:
        opt = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
        assert client.shares_memory
        assert opt.transport[0] == "shm"
        opt.close()
        assert client.optimizer(name, wire_dtype="bfloat16").transport[0] == "grpc"
    monkeypatch.setattr(sysv, "host_id", lambda: "another host")
    with optserve.connect(server.target) as client:
        assert not client.shares_memory
        opt = client.optimizer(name)
        assert opt.transport[0] == "grpc"
        opt.step(gradients(0))
        with pytest.raises(optserve.FeatureUnavailableError, match="is not on this host"):
            client.optimizer(name, transport="shm")


def test_gradients_made_in_place_are_not_copied(near, reference, monkeypatch):
    opt = near.create_optimizer("a", optserve.Adadelta(), gradients(0))

    def no_copy(*_arguments):
        raise AssertionError("copied")

    for seed in range(3):
        arrays = opt.buffers()
        for name, g in gradients(seed).items():
            arrays[name][...] = g
        with monkeypatch.context() as patch:
            patch.setattr("optserve._steps.shared_memory.np.copyto", no_copy)
            updates = opt.step(arrays, out=arrays)
        assert all(updates[name] is arrays[name] for name in SHAPES)
        assert bits(updates) == bits(reference.step(gradients(seed)))
    # Without shared memory the same code works, with arrays of its own.
    opt.close()
    far = near.optimizer("a", transport="grpc")
    arrays = far.buffers()
    for name, g in gradients(3).items():
        arrays[name][...] = g
    assert bits(far.step(arrays, out=arrays)) == bits(reference.step(gradients(3)))


def test_a_bad_value_is_refused_and_nothing_changes(near, reference):
    opt = near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    opt.step(gradients(0))
    reference.step(gradients(0))
    for name, place, value, index in (("w", (2, 3), np.nan, 805), ("b", 7, -np.inf, 7), ("w", (0, 0), 3e38, 0)):
        bad = gradients(1)
        bad[name][place] = value
        with pytest.raises(
            optserve.InvalidArgumentError, match=f"The gradient of '{name}' is .* at flat index {index}"
        ):
            opt.step(bad)
    assert opt.current_step == 1
    assert bits(opt.step(gradients(1))) == bits(reference.step(gradients(1)))


def test_a_second_client_uses_the_stream_and_neither_disturbs_the_other(near, reference, machine):
    mine = near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    mine.step(gradients(0))
    reference.step(gradients(0))
    with optserve.connect(machine.target) as other:
        theirs = other.optimizer("a")
        assert theirs.transport == (
            "grpc",
            "the server offers no shared memory now: its memory is full, or another client uses the segment",
        )
        for seed in range(1, 7):
            opt = (mine, theirs)[seed % 2]
            opt.refresh()
            # What the other writes into the segment meanwhile is no part of this step.
            for array in mine.buffers().values():
                array.fill(np.nan)
            assert bits(opt.step(gradients(seed))) == bits(reference.step(gradients(seed)))
        with pytest.raises(optserve.FeatureUnavailableError, match="another client uses the segment"):
            other.optimizer("a", transport="shm").step(gradients(9))
    mine.close()


def test_a_segment_that_cannot_be_reached_is_done_without(near, reference, monkeypatch):
    def fails(*_arguments):
        raise OSError("no such segment in this container")

    with monkeypatch.context() as patch:
        patch.setattr(sysv, "attach", fails)
        opt = near.create_optimizer("a", optserve.Adadelta(), gradients(0))
        kind, reason = opt.transport
        assert (kind, "no such segment in this container" in reason) == ("grpc", True)
        assert bits(opt.step(gradients(0))) == bits(reference.step(gradients(0)))
        with pytest.raises(optserve.FeatureUnavailableError, match="no such segment"):
            near.optimizer("a", transport="shm").step(gradients(0))
    opt.close()
    again = near.optimizer("a", transport="shm")
    assert bits(again.step(gradients(1))) == bits(reference.step(gradients(1)))


def test_a_reply_that_was_overwritten_is_not_replayed(near):
    opt = near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    expected = opt.step(gradients(0))
    assert bits(opt.replay()) == bits(expected)
    assert bits(opt.replay()) == bits(expected)
    durable = near.server_info().durability != "memory"
    opt.buffers()["w"].fill(0)
    if durable:
        assert bits(opt.replay()) == bits(expected)
    else:
        with pytest.raises(optserve.FailedPreconditionError, match="no longer retained"):
            opt.replay()
    opt.step(gradients(1))


# --- Crashes

CRASHING_CLIENT = """
import os, signal, sys
import numpy as np
import optserve
client = optserve.connect(sys.argv[1])
opt = client.optimizer("a", transport="shm")
opt.step({name: np.ones(shape, dtype) for name, (shape, dtype) in eval(sys.argv[2]).items()})
opt.buffers()["w"].fill(np.nan)  # in the middle of the next gradients
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_client_that_is_killed_leaves_nothing_behind(near, machine, reference):
    near.create_optimizer("a", optserve.Adadelta(), gradients(0)).close()
    ones = {name: np.ones_like(g) for name, g in gradients(0).items()}
    for _ in range(3):
        command = [sys.executable, "-c", CRASHING_CLIENT, machine.target, repr(SHAPES)]
        assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
        reference.step(ones)
    opt = near.optimizer("a", transport="grpc")
    assert bits(opt.step(gradients(1))) == bits(reference.step(gradients(1)))
    for _ in range(1000):
        if not segments(machine.process.pid):
            break
        near.server_info()
    assert segments(machine.process.pid) == []


def test_a_server_that_is_killed_is_resumed_and_leaves_nothing_behind(tmp_path, reference):
    with optserve.local_server(tmp_path, backend=BACKEND) as server:
        port = server.target.rpartition(":")[2]
        client = optserve.connect(server.target, PATIENT)
        opt = client.create_optimizer("a", optserve.Adadelta(), gradients(0))
        arrays = opt.buffers()
        for seed in range(2):
            for name, g in gradients(seed).items():
                arrays[name][...] = g
            opt.step(arrays, out=arrays)
            reference.step(gradients(seed))
        for name, g in gradients(2).items():
            arrays[name][...] = g
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with optserve.local_server(tmp_path, backend=BACKEND, options=["--port", port]):
        # The old arrays are ordinary ones now.
        assert bits(opt.step(arrays, out=arrays)) == bits(reference.step(gradients(2)))
        assert opt.transport[0] == "shm"
        fresh = opt.buffers()
        assert fresh["w"].ctypes.data != arrays["w"].ctypes.data
        assert bits(opt.step(gradients(3), out=fresh)) == bits(reference.step(gradients(3)))
    client.close()
    del arrays, fresh, opt
    gc.collect()  # errors and the frames that they came through form cycles
    assert segments(server.process.pid) == []


def test_a_client_that_scribbles_all_the_time_harms_nobody_else(near, machine, tmp_path):
    """The server lives, other optimizers are right, and a journal can be read afterwards."""
    good = near.create_optimizer("good", optserve.Adadelta(), gradients(0))
    bad = near.create_optimizer("bad", optserve.Sgd(learning_rate=1.0), {"x": optserve.TensorSpec((500_000,))})
    words = bad.buffers()["x"].view(np.uint32)
    whole = bad._session.stream(bad._connection.patience(None)).shared
    stop = threading.Event()

    def scribble() -> None:
        rng = np.random.default_rng(0)
        while not stop.is_set():
            words[rng.integers(0, words.size, 1000)] = rng.integers(0, 2**32, 1000)
            whole._memory[: 4096 - 32] = rng.integers(0, 256)

    thread = threading.Thread(target=scribble)
    thread.start()
    refused = 0
    try:
        for seed in range(30):
            good.step(gradients(seed))
            try:
                bad.step({"x": np.zeros(500_000, np.float32)})
            except optserve.InvalidArgumentError:
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert near.server_info().optimizer_count == 2
    expected = good.step(gradients(99))
    near.close()
    if (tmp_path / "data").exists():
        os.kill(machine.process.pid, signal.SIGKILL)
        machine.process.wait()
        with (
            optserve.local_server(tmp_path / "data", backend=BACKEND) as again,
            optserve.connect(again.target) as later,
        ):
            assert bits(later.optimizer("good").replay()) == bits(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_of_any_size_are_copied_out_of_the_segment(tmp_path, backend):
    """From two times 131,072 elements on, several threads share the work."""
    with optserve.local_server(tmp_path, backend=backend) as server, optserve.connect(server.target) as near:
        for size in (100_000, 262_143, 262_144, 1_000_003):
            gradient = {"x": np.random.default_rng(size).standard_normal(size).astype(np.float32)}
            for transport in ("shm", "grpc"):
                near.create_optimizer(f"{transport}-{size}", optserve.Adadelta(), gradient)
            shared, far = (near.optimizer(f"{transport}-{size}", transport=transport) for transport in ("shm", "grpc"))
            assert bits(shared.step(gradient, timeout_s=30)) == bits(far.step(gradient, timeout_s=30))


# --- The contract


def test_the_client_has_to_prove_that_it_sees_the_segment(stub, name):
    optimizer = create(stub, name, {"x": (2,)}).name
    options = {"transport": steps_pb2.TRANSPORT_SHARED_MEMORY}
    with stream(stub) as steps:
        offer = steps.open(optimizer, **options).shared_memory
        assert offer.segment.startswith("sysv:")
        steps.send(begin(shared_memory_nonce=b"x" * 32))
        reason, _, field, _ = details(steps.error())
        assert (reason, field) == ("INVALID_FIELD", "begin.shared_memory_nonce")
        # From then on this is a stream as any other.
        steps.send(begin(), chunk(0, 0, bytes(8)), commit())
        assert steps.reply()[1].step == 1
    with stream(stub) as steps:
        steps.open(optimizer, **options)
        assert steps.step_when_free(begin(), chunk(0, 0, bytes(8)), commit())[1].step == 2
    with stream(stub) as steps:
        offer = steps.open(optimizer, **options).shared_memory
        memory = sysv.attach(int(offer.segment.removeprefix("sysv:")), offer.size_bytes)
        nonce = memory[offer.nonce_offset :][:32].tobytes()
        reason = "STEP_IN_PROGRESS"
        # Until the server has seen the end of the stream before.
        while reason == "STEP_IN_PROGRESS":
            steps.send(begin(shared_memory_nonce=nonce), chunk(0, 0, bytes(8)))
            reason = details(steps.error())[0]
        assert reason == "INVALID_FIELD"
        memory[offer.dirty_offset] = 1
        steps.send(commit(), begin(), commit())
        payload, result = steps.reply()
        assert (payload, result.step) == (b"", 3)


def test_a_segment_is_the_owners_only_and_of_its_size_only():
    number, mine = sysv.create(10_000)
    theirs = sysv.attach(number, 10_000)
    mine[7] = 42
    assert theirs[7] == 42
    (line,) = [line for line in segments(os.getpid()) if int(line[1]) == number]
    assert int(line[2], 8) & 0o777 == 0o600
    for size in (9_999, 10_001, 4096):
        with pytest.raises(OSError, match="has 10000 bytes"):
            sysv.attach(number, size)
    del mine
    assert theirs[7] == 42
    del theirs
    with pytest.raises(OSError, match="cannot look at segment"):
        sysv.attach(number, 10_000)


def test_a_server_without_room_does_not_share(tmp_path):
    path = tmp_path / "optserve.toml"
    size = sum(g.nbytes for g in gradients(0).values())
    # Enough for the state and a buffer, with what the server counts beside them, and not for a segment.
    path.write_text(f"max_state_bytes = {3 * size + size // 2}\n")
    with (
        optserve.local_server(backend="numpy", options=["--config", str(path)]) as server,
        optserve.connect(server.target) as client,
    ):
        opt = client.create_optimizer("a", optserve.Adadelta(), gradients(0))
        assert opt.transport[0] == "grpc"
        opt.step(gradients(0))


def test_a_server_that_has_no_thread_for_an_offer_keeps_no_segment(monkeypatch):
    app = App(ServerConfig(port=0, backend="numpy"))
    app.start()
    try:
        with optserve.connect(app.target) as client:
            client.create_optimizer("a", optserve.Adadelta(), gradients(0))
            with monkeypatch.context() as patch:
                patch.setattr(threading.Timer, "start", Mock(side_effect=RuntimeError("can't start new thread")))
                with pytest.raises(optserve.InternalError):
                    client.optimizer("a", transport="shm").step(gradients(0))
            opt = client.optimizer("a", transport="shm")
            opt.step(gradients(0))
            assert opt.transport[0] == "shm"
    finally:
        app.stop()


def test_health_of_the_fallback_is_shown_by_info(server):
    command = [sys.executable, "-c", "from optserve.cli import main; main()", "info", "--target", server.target]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "shared memory" in shown


def test_no_connection_is_made_for_grpc_alone(server, name):
    """A client that is told to use the stream does not ask for a segment."""
    with optserve.connect(server.target, optserve.ClientConfig(transport="grpc")) as client:
        before = len(segments(server.process.pid))
        opt = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
        opt.step(gradients(0))
        assert opt.transport == ("grpc", "shared memory was not asked for")
        assert len(segments(server.process.pid)) <= before


def test_memory_is_shared_again_by_a_stream_that_follows_while_the_last_one_still_ends(near):
    opt = near.create_optimizer("a", optserve.Adadelta(), gradients(0))
    opt.step(gradients(0))
    opt.close()
    # Stands for a stream whose end the server has not noticed yet.
    last = near.optimizer("a", transport="shm")
    assert last.transport[0] == "shm"
    ending = threading.Timer(0.05, last.close)
    ending.start()
    assert opt.transport[0] == "shm"
    ending.join()
