"""The control socket: short messages beside the stream, where memory is shared."""

import collections
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

import optserve
from optserve._common import control, sysv
from optserve._common.wire import encode
from optserve._steps import stream as stream_module
from optserve.v1 import steps_pb2
from present import present
from service.attacks import wait_until
from service.wire_client import begin, commit, create, details, stream

MODEL = {"w": np.ones((20, 3), np.float32), "b": np.ones(3, np.float64)}


def gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(array.shape).astype(array.dtype) for name, array in MODEL.items()}


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture
def own_server():
    with optserve.local_server(backend="numpy") as server:
        yield server


@contextmanager
def stopped(server: optserve.LocalServer) -> Iterator[None]:
    """A server that does not run meanwhile, from the first line on: a signal alone may be late for some threads."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@pytest.fixture
def opt(own_server):
    with optserve.connect(own_server.target) as client:
        yield client.create_optimizer("a", optserve.Adadelta(), MODEL)


@pytest.fixture
def expected(client, name):
    """What the updates of a few steps are, by way of gRPC."""
    client.create_optimizer(name, optserve.Adadelta(), MODEL)
    reference = client.optimizer(name, transport="grpc")
    return [bits(reference.step(gradients(seed))) for seed in range(3)]


@pytest.fixture
def sent_over_grpc(monkeypatch, expected):
    """The messages that take the stream itself, the `open` of each included."""
    messages = []
    put = stream_module.Outgoing.put

    def record(outgoing, step):
        step = list(step)
        messages.extend(steps_pb2.StreamStepsRequest.FromString(message) for message in step)
        put(outgoing, iter(step))

    monkeypatch.setattr(stream_module.Outgoing, "put", record)
    return messages


def test_steps_errors_and_replays_take_it(sent_over_grpc, opt, expected):
    assert bits(opt.step(gradients(0))) == expected[0]
    bad = gradients(1)
    bad["b"][1] = np.nan
    with pytest.raises(optserve.InvalidArgumentError, match="'b' is nan at flat index 1"):
        opt.step(bad)
    updates = opt.step(gradients(1))
    assert bits(updates) == expected[1]
    assert [message.HasField("open") for message in sent_over_grpc] == [True]
    # A replay asks the server first what its last step was, by opening another stream.
    assert bits(opt.replay()) == bits(updates)
    assert all(message.HasField("open") for message in sent_over_grpc)


def test_where_it_cannot_be_reached_control_takes_the_stream_and_info_says_so(
    sent_over_grpc, own_server, opt, expected, monkeypatch
):
    monkeypatch.setattr("optserve._common.control.socket.AF_UNIX", socket.AF_INET)
    for seed in range(2):
        assert bits(opt.step(gradients(seed))) == expected[seed]
    transport, reason = opt.transport
    assert transport == "shm"
    assert "control takes gRPC" in reason
    assert [message.HasField("commit") for message in sent_over_grpc] == [False, True, True]


def test_a_message_too_long_for_a_packet_takes_the_stream(sent_over_grpc, opt, expected, monkeypatch):
    opt.step(gradients(0))
    monkeypatch.setattr("optserve._steps.stream.MAX_PACKET_BYTES", 10)
    assert bits(opt.step(gradients(1))) == expected[1]
    monkeypatch.undo()
    assert bits(opt.step(gradients(2))) == expected[2]
    assert len(sent_over_grpc) == 2


def is_ended(end: socket.socket) -> bool:
    """Whether the other side has closed a connection, which it may do with a packet of ours unread."""
    try:
        return end.recv(100) == b""
    except ConnectionResetError:
        return True


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(own_server, opt, expected):
    opt.step(gradients(0))
    with stopped(own_server), pytest.raises(optserve.DeadlineExceededError):
        opt.step(gradients(1), timeout_s=0.2)
    # The message had been sent, and was found when the server went on, or not.
    try:
        updates = opt.step(gradients(1))
    except optserve.StepInDoubtError:
        updates = opt.replay()
    assert bits(updates) == expected[1]
    assert opt.current_step == 2


def test_a_step_that_waits_can_be_cancelled(own_server, opt):
    opt.step(gradients(0))
    with stopped(own_server):
        patience = opt._connection.patience(None)
        failures = []

        def step():
            try:
                opt._step(patience, gradients(1))
            except optserve.OptserveError as error:
                failures.append(error)

        thread = threading.Thread(target=step)
        thread.start()
        assert patience.cancel()
        thread.join(20)
        assert isinstance(failures[0], optserve.StepCancelledError)


def test_a_killed_server_is_noticed_at_once(own_server, opt):
    opt.step(gradients(0))
    os.kill(own_server.process.pid, signal.SIGKILL)
    own_server.process.wait()
    begun = time.monotonic()
    with pytest.raises(optserve.DeadlineExceededError):
        opt.step(gradients(1), timeout_s=2)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("reachable", [True, False])
def test_nothing_is_left_behind_by_streams_that_end(own_server, reachable, monkeypatch):
    if not reachable:
        monkeypatch.setattr("optserve._common.control.socket.AF_UNIX", socket.AF_INET)
    threads, files = (Path(f"/proc/{own_server.process.pid}/{kind}") for kind in ("task", "fd"))
    held = []
    with optserve.connect(own_server.target) as client:
        client.create_optimizer("a", optserve.Adadelta(), MODEL)
        # This one insists, where the server has not yet noticed that the stream before has ended.
        opt = client.optimizer("a", transport="shm")
        for seed in range(30):
            opt.step(gradients(seed))
            held.append([len(list(kind.iterdir())) for kind in (threads, files)])
            opt.close()
    # At most the one that has just ended is still there, and it may have been at either time.
    assert all(late <= early + 2 for early, late in zip(held[9], held[-1], strict=True)), held


def test_closing_the_client_releases_a_step_that_waits(own_server):
    client = optserve.connect(own_server.target)
    opt = client.create_optimizer("a", optserve.Adadelta(), MODEL)
    opt.step(gradients(0))
    failures = []

    def step():
        try:
            opt.step(gradients(1), timeout_s=60)
        except optserve.OptserveError as error:
            failures.append(error)

    with stopped(own_server):
        thread = threading.Thread(target=step)
        thread.start()
        # The server stands still, so nothing else shows that the step is under way.
        wait_until(lambda: opt._session._patience is not None)
        client.close()
        thread.join(20)
        assert not thread.is_alive()
        assert isinstance(failures[0], optserve.ClientUseError)


def test_the_programs_default_time_out_of_sockets_does_not_hold(sent_over_grpc, own_server):
    with optserve.connect(own_server.target) as client:
        opt = client.create_optimizer("a", optserve.Adadelta(), {"x": np.ones(2_000_000, np.float32)})
        socket.setdefaulttimeout(0.0005)
        try:
            for _ in range(3):
                opt.step({"x": np.ones(2_000_000, np.float32)})
        finally:
            socket.setdefaulttimeout(None)
        assert len(sent_over_grpc) == 1


def test_a_socket_that_the_server_does_not_name_is_not_looked_for():
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        listener.bind("\0")
        listener.listen()
        with pytest.raises(OSError, match="the server has no control socket"):
            control.ControlConnection("", bytes(32))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_server_of_another_user_is_not_trusted(tmp_path):
    program = (
        "import os, socket; os.setuid(65534); end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        f"end.bind('\\0{tmp_path}'); end.listen(); print('ready', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        assert present(stranger.stdout).readline() == b"ready\n"
        with pytest.raises(PermissionError, match="another user"):
            control.ControlConnection(str(tmp_path), bytes(32))
        stranger.communicate(b"\n")


# --- The contract


@pytest.fixture
def memory(stub, name):
    """An open stream on an optimizer of two elements, its offer, and the segment, in which the first gradients are."""
    optimizer = create(stub, name, {"x": (2,)}).name
    with stream(stub) as steps:
        offer = steps.open(optimizer, transport=steps_pb2.TRANSPORT_SHARED_MEMORY).shared_memory
        memory = sysv.attach(int(offer.segment.removeprefix("sysv:")), offer.size_bytes)
        memory[offer.dirty_offset] = 1
        yield steps, offer, memory


@pytest.fixture
def offered(memory):
    """The stream, its control socket, and the nonce."""
    steps, offer, segment = memory
    return steps, offer.control_socket, segment[offer.nonce_offset :][:32].tobytes()


def packets(name: str, first: bytes) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(10)
    try:
        end.connect(f"\0{name}")
        end.send(first)
    except OSError:
        end.close()
        raise
    return end


def whole_step() -> steps_pb2.StreamStepsRequest:
    message = begin()
    message.commit.SetInParent()
    return message


def request(message: steps_pb2.StreamStepsRequest, nonce: bytes) -> bytes:
    message.begin.shared_memory_nonce = nonce
    return encode(message)


def test_a_client_without_the_nonce_is_turned_away_and_the_next_one_is_not(offered):
    _, name, nonce = offered
    for wrong in (b"x" * 32, nonce[:31], nonce + b"x", b"x" * 100_000):
        with closing(packets(name, wrong)) as end:
            assert is_ended(end)
    with closing(packets(name, nonce)) as end:
        end.send(request(whole_step(), nonce))
        answer = steps_pb2.StreamStepsResponse.FromString(end.recv(1 << 16))
        assert answer.result.step == 1


def test_messages_may_take_either_way_one_at_a_time(offered, memory):
    steps, name, nonce = offered
    _, offer, segment = memory
    with closing(packets(name, nonce)) as end:
        end.send(request(begin(), nonce))
        # Begun there, committed here.
        end.send(encode(commit()))
        assert steps_pb2.StreamStepsResponse.FromString(end.recv(1 << 16)).result.step == 1
        segment[offer.dirty_offset] = 1
        steps.send(begin(), commit())
        assert steps.reply()[1].step == 2


def test_what_lies_in_the_memory_is_a_gradient_once(memory, offered):
    steps, _, nonce = offered
    _, offer, segment = memory
    steps.send(begin(shared_memory_nonce=nonce), commit())
    assert steps.reply()[1].step == 1
    # What lies there now is the last update.
    steps.send(begin(), commit())
    assert details(steps.error())[0] == "MISSING_CHUNK"
    segment[offer.dirty_offset] = 1
    steps.send(begin("written"), commit())
    assert steps.reply()[1].step == 2
    steps.send(begin("written"), commit())
    assert steps.reply()[1].replayed


@pytest.mark.parametrize("bad", [b"\xff" * 40, encode(steps_pb2.StreamStepsRequest(open=steps_pb2.Open(name="x")))])
def test_a_message_that_would_end_the_stream_is_answered_and_ends_the_connection(offered, bad):
    steps, name, nonce = offered
    with closing(packets(name, nonce)) as end:
        end.send(bad)
        answer = steps_pb2.StreamStepsResponse.FromString(end.recv(1 << 16))
        assert details(answer.error.status)[0] in ("INVALID_FIELD", "ALREADY_OPEN")
        assert is_ended(end)
    steps.send(begin(shared_memory_nonce=nonce), commit())
    assert steps.reply()[1].step == 1


def test_a_packet_that_is_too_long_ends_the_connection_and_changes_nothing(offered):
    steps, name, nonce = offered
    with closing(packets(name, nonce)) as end:
        end.send(b"\x12" * (control.MAX_PACKET_BYTES + 1))
        assert is_ended(end)
    steps.send(begin(shared_memory_nonce=nonce), commit())
    assert steps.reply()[1].step == 1


def test_a_step_whose_answer_nobody_takes_is_applied_once_and_is_over(offered):
    steps, name, nonce = offered
    message = whole_step()
    message.begin.shared_memory_nonce = nonce
    with closing(packets(name, nonce)) as end:
        # The server finds nobody on the other side when it answers.
        end.shutdown(socket.SHUT_RD)
        end.send(encode(message))
        assert is_ended(end)
    # Neither a second commit nor another begin finds a step under way.
    steps.send(commit())
    assert details(steps.error())[0] == "NO_STEP"
    message.begin.shared_memory_nonce = b""
    steps.send(message)
    _, result = steps.reply()
    assert (result.step, result.replayed) == (1, True)


def test_a_client_that_does_not_read_its_answers_is_cut_off(offered):
    steps, name, nonce = offered
    with closing(packets(name, nonce)) as end:
        end.settimeout(0.5)
        unread = itertools.repeat(encode(commit()), 100_000)
        with pytest.raises(OSError, match=r"timed out|Broken pipe|reset"):
            collections.deque(map(end.send, unread), maxlen=0)
        steps.send(begin(shared_memory_nonce=nonce), commit())
        assert steps.reply()[1].step == 1


def test_clients_that_prove_nothing_hold_nobody_up_for_long(offered):
    _, name, nonce = offered
    silent = [packets(name, b"") for _ in range(3)]
    with closing(packets(name, nonce)) as end:
        end.send(request(whole_step(), nonce))
        assert steps_pb2.StreamStepsResponse.FromString(end.recv(1 << 16)).result.step == 1
    for end in silent:
        end.close()


def test_it_ends_with_its_stream(offered):
    steps, name, nonce = offered
    with closing(packets(name, nonce)) as end:
        steps.half_close()
        assert is_ended(end)
    with pytest.raises(ConnectionRefusedError):
        packets(name, nonce)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_turned_away_even_with_the_nonce(offered):
    _, name, nonce = offered
    program = (
        "import os, socket; os.setuid(65534); end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        f"end.connect('\\0{name}'); end.send(bytes.fromhex('{nonce.hex()}')); print(end.recv(100))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "b''" or "BrokenPipe" in run.stderr or "ConnectionReset" in run.stderr, run.stderr
    with closing(packets(name, nonce)) as end:
        end.send(request(whole_step(), nonce))
        assert steps_pb2.StreamStepsResponse.FromString(end.recv(1 << 16)).result.step == 1
