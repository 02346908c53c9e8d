"""One client must not stop the others: attacks, while another client's steps and health checks are timed."""

import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import optserve
from optserve.optimizer import TransportName
from optserve.v1 import checkpoints_pb2, optimizer_pb2, replicas_pb2, service_pb2, service_pb2_grpc, steps_pb2
from optserve_server.domain.config import ServerConfig
from optserve_server.edge.gate.interceptors import ARRIVING, LEAVING, QUEUED_PER_THREAD
from service.attacks import (
    CHECK,
    SERVICE,
    SIZE,
    WATCH,
    Raw,
    Times,
    Victim,
    assert_unharmed,
    attempted,
    raw,
    used,
    victim,
    wait_until,
)
from service.wire_client import begin, chunk, commit, create, details, stream

pytestmark = pytest.mark.quiet

MIB = 1 << 20
CALM_S, ATTACK_S = 0.8, 1.5
POOL_THREADS = ARRIVING + LEAVING + (1 + QUEUED_PER_THREAD) * ServerConfig().unary_threads
"""Most in the largest pool; an attack is on one."""

SETTINGS = {"max_streams": 12, "max_watchers": 12, "receive_s": 1.0, "idle_step_s": 1.5, "max_reply_bytes": 16 * MIB}
"""Small, so that a few connections are an attack, and what they hold comes back soon."""


@contextmanager
def serving(folder: Path, **settings) -> Iterator[optserve.LocalServer]:
    path = folder / "optserve.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in {**SETTINGS, **settings}.items()))
    with optserve.local_server(backend="numpy", options=["--config", str(path)]) as server:
        yield server


def attacked(
    server: optserve.LocalServer,
    attack: Callable[[], object],
    after: Callable[[], object] = lambda: None,
    kept_bytes: int = 100 * MIB,
) -> None:
    """Attack again and again while the victim trains; after the end of it everything is back.

    Except for threads, which a pool keeps for the next calls, and for what the allocator keeps of freed memory.
    """
    with victim(server.target) as other:
        before = other.times(CALM_S)
        held = used(server)
        during = times_of(other, attack, ATTACK_S)
        assert_unharmed(before, during)
        other.times(0.2)
    after()
    wait_until(lambda: used(server).descriptors <= held.descriptors + 4)
    assert used(server).threads <= held.threads + POOL_THREADS
    wait_until(lambda: used(server).rss_bytes <= held.rss_bytes + kept_bytes)


def times_of(other: Victim, attack: Callable[[], object], seconds: float) -> Times:
    """The victim's, while it is attacked for so long."""
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            attempted(attack)
            over.wait(0.3)

    attacker = threading.Thread(target=go_on)
    attacker.start()
    try:
        return other.times(seconds)
    finally:
        over.set()
        attacker.join()


@pytest.mark.parametrize("path", [SERVICE + "GetServerInfo", SERVICE + "ExportState", WATCH, CHECK])
def test_calls_that_send_no_message(tmp_path, path):
    """300 of them held all threads."""
    with serving(tmp_path) as server, raw(server.target, 4) as connections:

        def attack() -> None:
            for connection in connections:
                for _ in range(20):
                    connection.call(path)

        attacked(server, attack)
        with optserve.connect(server.target) as client:
            assert client.server_info().backend == "numpy"


def test_unary_calls_of_others_are_answered_while_calls_that_send_no_message_go_on(tmp_path):
    with serving(tmp_path) as server, raw(server.target, 2) as connections, optserve.connect(server.target) as client:
        for _ in range(5):
            for connection in connections:
                attempted(lambda connection=connection: [connection.call(SERVICE + "GetServerInfo") for _ in range(50)])
            assert client.server_info().backend == "numpy"


@pytest.mark.parametrize("path", [WATCH, CHECK])
def test_health_checks_and_watchers_without_a_window(tmp_path, path):
    with serving(tmp_path) as server, raw(server.target, 4, no_window=True) as connections:

        def attack() -> None:
            for connection in connections:
                for _ in range(20):
                    connection.call(path, b"", end=True)

        attacked(server, attack)
        # Whoever does not take the first answer has given its place away.
        with grpc.insecure_channel(server.target) as channel:
            wait_until(lambda: is_served(health_pb2_grpc.HealthStub(channel)))


def is_served(health) -> bool:
    """Whether there is a place for a watcher."""
    try:
        return next(health.Watch(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
        return False


def test_the_number_of_watchers_is_limited(tmp_path):
    with serving(tmp_path) as server, grpc.insecure_channel(server.target) as channel, ExitStack() as stack:
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(12):
            watcher = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            stack.callback(watcher.cancel)
            assert next(watcher).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("path", [WATCH, SERVICE + "GetServerInfo"])
def test_a_client_that_takes_nothing_does_not_keep_a_server_from_stopping(tmp_path, path):
    """It hung for ever, and with durability `snapshot` the steps since the last snapshot were lost."""
    options = ["--durability", "snapshot"]
    with (
        optserve.local_server(tmp_path / "data", backend="numpy", options=options) as server,
        raw(server.target, no_window=True) as (attacker,),
        optserve.connect(server.target) as client,
    ):
        opt = client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), {"x": np.zeros(3, np.float32)})
        opt.step({"x": np.ones(3, np.float32)})
        for _ in range(20):
            attacker.call(path, b"", end=True)
            attacker.call(path)
        opt.step({"x": np.ones(3, np.float32)})
        server.process.terminate()
        assert server.process.wait(15) == 0
    with (
        optserve.local_server(tmp_path / "data", backend="numpy", options=options) as server,
        optserve.connect(server.target) as client,
    ):
        assert client.optimizer("a").current_step == 2


def large(stub, optimizer_id: str) -> int:
    """An optimizer whose description is large; gives its bytes."""
    optimizer = optimizer_pb2.Optimizer(
        parameters=[optimizer_pb2.Parameter(name=f"{i:05d}" + "n" * 150, shape=[0]) for i in range(5000)]
    )
    optimizer.algorithm.sgd.SetInParent()
    request = service_pb2.CreateOptimizerRequest(optimizer_id=optimizer_id, optimizer=optimizer)
    return stub.CreateOptimizer(request).ByteSize()


def test_replies_that_nobody_reads(tmp_path):
    """48 kB of requests held 2 GiB."""
    with serving(tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        assert large(service_pb2_grpc.OptimizerServiceStub(channel), "large") > 700_000
        request = service_pb2.GetOptimizerRequest(name="optimizers/large").SerializeToString()
        before = used(server)
        with raw(server.target, 2, no_window=True) as connections:

            def attack() -> None:
                for connection in connections:
                    for _ in range(20):
                        connection.call(SERVICE + "GetOptimizer", request, end=True)

            attacked(server, attack)
            assert used(server).rss_bytes - before.rss_bytes < 100 * MIB
            with optserve.connect(server.target) as client:
                assert client.server_info().backend == "numpy"


def test_streams_that_are_never_opened(tmp_path):
    with serving(tmp_path) as server, raw(server.target, 2) as connections:

        def attack() -> None:
            for connection in connections:
                for _ in range(12):
                    connection.call(SERVICE + "StreamSteps")

        attacked(server, attack)
        with optserve.connect(server.target) as client:
            client.optimizer("victim", transport="grpc").step({"x": np.ones(SIZE, np.float32)})


def test_a_stream_that_is_silent_gives_its_place_to_one_that_needs_it(tmp_path):
    """The client whose place it was opens another when it goes on."""
    gradient = {"x": np.ones(2, np.float32)}
    with serving(tmp_path, max_streams=2, idle_step_s=0.5) as server, ExitStack() as stack:
        clients = [stack.enter_context(optserve.connect(server.target)) for _ in range(3)]
        made = []
        for number, client in enumerate(clients):
            client.create_optimizer(f"o{number}", optserve.Sgd(learning_rate=1.0), {"x": np.zeros(2, np.float32)})
            made.append(client.optimizer(f"o{number}", transport="grpc"))
        for _ in range(2):
            for opt in made:
                opt.step(gradient, timeout_s=20)
        assert [opt.current_step for opt in made] == [2, 2, 2]


def test_a_stream_whose_steps_pass_its_control_socket_is_not_silent(tmp_path):
    """Among streams it is the other one, silent for longer, that gives its place to a newcomer."""
    gradient = {"x": np.ones(2, np.float32)}
    with serving(tmp_path, max_streams=2, idle_step_s=0.5) as server, ExitStack() as stack:
        made = []
        transports: dict[str, TransportName] = {"active": "shm", "silent": "grpc", "newcomer": "grpc"}
        for name, transport in transports.items():
            client = stack.enter_context(optserve.connect(server.target))
            client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"x": np.zeros(2, np.float32)})
            made.append(client.optimizer(name, transport=transport))
        active, silent, newcomer = made
        active.step(gradient)
        memory = active.buffers()["x"]
        silent.step(gradient)
        active.step(gradient)
        newcomer.step(gradient, timeout_s=20)
        active.step(gradient, timeout_s=20)
        # After a lost connection it would be other memory; this one is still there, so the address cannot come again.
        assert active.buffers()["x"].ctypes.data == memory.ctypes.data


@pytest.fixture
def hosted(tmp_path) -> Iterator[tuple[optserve.LocalServer, optserve.Client]]:
    """A server, and a client of a hosted optimizer of 24 MB named `a`."""
    with serving(tmp_path) as server, optserve.connect(server.target) as client:
        x = {"x": np.zeros(6_000_000, np.float32)}
        client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), x, hosted=True)
        yield server, client


def test_imports_of_empty_messages_keep_no_place(hosted):
    server, client = hosted
    state = client.optimizer("a").export_state()
    first = checkpoints_pb2.ImportStateRequest(name="optimizers/a").SerializeToString()
    with raw(server.target) as (attacker,):
        calls = [attacker.call(SERVICE + "ImportState", first) for _ in range(8)]

        def attack() -> None:
            for call in calls:
                attacker.send(call, b"\0\0\0\0\0")

        attacked(server, attack)

        over = threading.Event()

        def go_on() -> None:
            while not over.wait(0.1):
                attempted(attack)

        # Others as well, in a thread that nothing holds up.
        calls.extend(attacker.call(SERVICE + "ImportState", first) for _ in range(8))
        attacking = threading.Thread(target=go_on)
        attacking.start()
        try:
            wait_until(lambda: can(lambda: client.optimizer("a").import_state(state)))
        finally:
            over.set()
            attacking.join()


def can(call: Callable[[], object]) -> bool:
    try:
        call()
    except optserve.ResourceExhaustedError:
        return False
    return True


@pytest.mark.parametrize("method", ["ExportState", "PullParameters"])
def test_transfers_that_nobody_reads_keep_no_place(hosted, method):
    server, client = hosted
    kind = {"ExportState": checkpoints_pb2.ExportStateRequest, "PullParameters": replicas_pb2.PullParametersRequest}
    request = kind[method](name="optimizers/a").SerializeToString()
    with raw(server.target, no_window=True) as (attacker,):
        attacked(server, lambda: [attacker.call(SERVICE + method, request, end=True) for _ in range(4)])
        assert client.optimizer("a").export_state().step == 0
        assert client.optimizer("a").pull_parameters().step == 0


@pytest.mark.parametrize("method", ["ExportState", "PullParameters"])
def test_a_transfer_that_nobody_reads_gives_its_place_to_one_that_needs_it(tmp_path, method):
    """Long before it is ended for not moving."""
    kind = {"ExportState": checkpoints_pb2.ExportStateRequest, "PullParameters": replicas_pb2.PullParametersRequest}
    request = kind[method](name="optimizers/a").SerializeToString()
    with serving(tmp_path, max_streams=4, idle_step_s=600.0) as server, optserve.connect(server.target) as client:
        x = {"x": np.zeros(6_000_000, np.float32)}
        opt = client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), x, hosted=True)
        with raw(server.target, 2, no_window=True) as connections, grpc.insecure_channel(server.target) as channel:
            stub = service_pb2_grpc.OptimizerServiceStub(channel)

            def are_taken() -> bool:
                for connection in connections:
                    for _ in range(2):
                        connection.call(SERVICE + method, request, end=True)
                return is_full(stub)

            wait_until(are_taken)
            # Refused until one of them has not taken anything for a while, and then let in.
            wait_until(lambda: can(opt.pull_parameters), seconds=60)
            wait_until(lambda: can(opt.export_state), seconds=60)


def is_full(stub: service_pb2_grpc.OptimizerServiceStub) -> bool:
    """Whether there is no place for one more stream."""
    try:
        list(stub.PullParameters(replicas_pb2.PullParametersRequest(name="optimizers/a")))
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


def test_segments_that_nobody_proves_to_see(tmp_path):
    """One was kept for as long as its stream, so that no other client could share memory."""
    with serving(tmp_path, receive_s=0.5) as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        name = create(stub, "a", {"x": (2,)}).name
        shared = steps_pb2.TRANSPORT_SHARED_MEMORY
        with stream(stub) as first:
            nonce_offset = first.open(name, transport=shared).shared_memory.nonce_offset
            assert nonce_offset == 0
            wait_until(lambda: is_offered(stub, name))
            first.send(begin(shared_memory_nonce=bytes(32)))
            assert details(first.error())[0] == "STEP_TAKEN_OVER"
            first.send(begin(), chunk(0, 0, bytes(8)), commit())
            assert first.reply()[1].step == 1


def is_offered(stub, name: str) -> bool:
    """Whether a new stream is offered shared memory."""
    with stream(stub) as other:
        return other.open(name, transport=steps_pb2.TRANSPORT_SHARED_MEMORY).HasField("shared_memory")


def test_messages_that_are_never_complete(tmp_path):
    """Each stream could hold 9 MiB of one, which nobody counted."""
    with serving(tmp_path, max_streams=40, memory_bytes=160 * MIB) as server:
        begun = struct.pack(">BI", 0, 9_000_000)
        before = used(server).rss_bytes
        peak = 0
        with ExitStack() as stack:
            (attacker,) = stack.enter_context(raw(server.target))

            def attack() -> None:
                nonlocal peak
                first = steps_pb2.StreamStepsRequest(open=steps_pb2.Open(name="optimizers/victim")).SerializeToString()
                for _ in range(6):
                    call = attacker.call(SERVICE + "StreamSteps", first)
                    attacker.send(call, begun + bytes(8 * MIB))
                    peak = max(peak, used(server).rss_bytes)

            # What the allocator gives back only when it is asked lies between pieces that are in use.
            attacked(server, attack, after=attacker.close, kept_bytes=200 * MIB)
        assert peak > before + 16 * MIB  # two of the messages; less would be no attack
        assert peak < 220 * MIB


def test_messages_of_unknown_fields(tmp_path):
    """A megabyte of them held the interpreter for half a second; a stream of them slowed everyone down."""
    message = steps_pb2.StreamStepsRequest(open=steps_pb2.Open(name="optimizers/none")).SerializeToString()
    unknown = b"\x48\x00" * 400_000
    with serving(tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream(SERVICE + "StreamSteps", bytes, bytes)
        attacked(server, lambda: list(call(iter([message + unknown]), timeout=5)))


def test_statistics_and_lists_of_all_that_may_be_asked_for(tmp_path):
    with serving(tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        large(stub, "large")

        def attack() -> None:
            with ThreadPoolExecutor(8) as pool:
                request = service_pb2.GetOptimizerRequest(name="optimizers/large")
                list(pool.map(lambda _: stub.GetOptimizer(request), range(8)))

        attacked(server, attack)


@contextmanager
def soft_limit_of_descriptors(limit: int) -> Iterator[None]:
    """What this process starts meanwhile begins with that limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_do_nothing(tmp_path):
    """1,100 at a soft limit of 1,024 had steps refused. Here 300, at 200; the server raises its limit by itself."""
    with ExitStack() as stack:
        with soft_limit_of_descriptors(200):
            server = stack.enter_context(serving(tmp_path, max_connections=1000))
        host, port = server.target.split(":")
        idle: list[Raw | socket.socket] = []

        def attack() -> None:
            if not idle:
                idle.extend(Raw(server.target) for _ in range(50))
                idle.extend(socket.create_connection((host, int(port))) for _ in range(250))

        attacked(server, attack, after=lambda: [connection.close() for connection in idle])


def test_no_more_connections_are_let_in_than_the_limit(tmp_path):
    with (
        serving(tmp_path, max_connections=10) as server,
        victim(server.target) as other,
        raw(server.target, 30) as connections,
    ):
        wait_until(lambda: sum(connection.closed for connection in connections) >= 20)
        # Those that are there already go on.
        assert other.times(0.2).health


@pytest.mark.parametrize(("limit", "connections"), [(100_000, 4096), (3000, 1976), (600, 300), (30, 16)])
def test_connections_leave_descriptors_for_everything_else(limit, connections):
    script = (
        "import resource, sys\n"
        "from optserve_server.domain.descriptors import room_for_connections\n"
        "hard = min(int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 64), hard))\n"
        "print(room_for_connections(4096, 256), *resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    command = [sys.executable, "-c", script, str(limit)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    room, soft, hard = map(int, told.stdout.split())
    assert room == connections or hard < limit
    assert soft == min(hard, 4096 + 256 + 3 * 256)
    assert ("the system grants" in told.stderr) == (room < 4096)
