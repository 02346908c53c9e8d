"""The server as a process: what it says of itself, its limits, its memory, its end."""

import ctypes
import itertools
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import optserve
from backend_under_test import BACKEND, BACKENDS
from clocks import StoppedClock
from optserve.v1 import (
    algorithms_pb2,
    checkpoints_pb2,
    optimizer_pb2,
    replicas_pb2,
    service_pb2,
    service_pb2_grpc,
    steps_pb2,
)
from optserve.v1.steps_pb2 import StreamStepsRequest as Request
from optserve_server.numerics.rules import RULES
from service.wire_client import begin, chunk, commit, create, details, refused, stream
from service.worker_harness import app

MIB = 1 << 20
DATA_TYPES = optimizer_pb2.DATA_TYPE_FLOAT32, optimizer_pb2.DATA_TYPE_FLOAT64


def config_file(folder: Path, **settings) -> list[str]:
    """Options that make a server read these settings."""
    path = folder / "optserve.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return ["--config", str(path)]


def test_server_info_says_what_it_is_has_and_lacks(stub):
    info = stub.GetServerInfo(service_pb2.GetServerInfoRequest())
    assert info.backend == BACKEND
    assert info.backend_reason == "asked for by name"
    assert info.durability == "memory"
    assert set(info.methods) == set(RULES)
    features = {service_pb2.Feature.Name(status.feature): status.available for status in info.features}
    # The second was never released.
    unknown = {"FEATURE_UNSPECIFIED", "FEATURE_WEIGHT_DECAY_KINDS"}
    assert set(features) == set(service_pb2.Feature.keys()) - unknown
    assert features["FEATURE_STREAMED_STEPS"]
    assert features["FEATURE_SHARED_MEMORY"]
    assert features["FEATURE_WORKERS"]


def test_reflection_describes_the_service(server):
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "optserve.v1.OptimizerService" in database.get_services()
        assert database.FindFileContainingSymbol("optserve.v1.OptimizerService").name == "optserve/v1/service.proto"


def test_health_and_unary_calls_answer_while_every_stream_is_taken(tmp_path):
    options = config_file(tmp_path, max_streams=4, unary_threads=2)
    with (
        optserve.local_server(options=options) as server,
        grpc.insecure_channel(server.target) as channel,
        ExitStack() as streams,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        names = [create(stub, f"o{index}", {"x": (1,)}).name for index in range(4)]
        for name in names:
            held = streams.enter_context(stream(stub, name))
            held.send(begin())
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS") as seen, stream(stub, names[0]):
            pass
        assert seen["retry_s"] == 1.0
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=20).limits.max_streams == 4
        streams.close()
        # The places are free again as soon as the streams have ended.
        for _ in range(1000):
            try:
                with stream(stub, names[0]):
                    break
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
        else:
            pytest.fail("the places of closed streams were not freed")


def test_health_watchers_occupy_no_threads(tmp_path):
    options = config_file(tmp_path, max_streams=2, unary_threads=2)
    with optserve.local_server(options=options) as server, grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watchers = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(8)]
        for watcher in watchers:
            assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
        for watcher in watchers:
            watcher.cancel()


def test_watchers_that_come_and_go_never_stop_the_server(tmp_path):
    """grpcio-health-checking's own servicer stands still here within seconds, and the whole server with it."""
    with optserve.local_server() as server:

        def come_and_go() -> None:
            with grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for _ in range(60):
                    watcher = health.Watch(health_pb2.HealthCheckRequest())
                    assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
                    watcher.cancel()

        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(come_and_go) for _ in range(6)]:
                future.result(timeout=60)
        with grpc.insecure_channel(server.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
            assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            last = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(8)]
            for watcher in last:
                assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
            # The moment at which the two used to meet: watchers go away while they are told of the end.
            server.process.terminate()
            for watcher in last:
                watcher.cancel()
        assert server.process.wait(10) == 0


def test_a_step_that_does_not_move_gives_way():
    clock = StoppedClock()
    with app(clock, idle_step_s=4.0) as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        name = create(stub, "a", {"x": (2,)}).name
        with stream(stub, name) as idle, stream(stub, name) as other:
            idle.send(begin(), chunk(0, 0, bytes(4)))
            _wait_until_under_way(stub, name)
            clock.seconds += 3.9
            other.send(begin(), chunk(0, 0, bytes(8)), commit())
            assert details(other.error())[0] == "STEP_IN_PROGRESS"
            clock.seconds += 0.2
            other.send(begin(), chunk(0, 0, bytes(8)), commit())
            assert other.reply()[1].step == 1
            idle.send(chunk(0, 4, bytes(4)), commit())
            assert details(idle.error())[0] == "STEP_TAKEN_OVER"


def test_a_step_that_stalls_is_discarded_though_nobody_wants_its_place(tmp_path):
    # A stream whose client does not take a message for so long is ended, which a busy machine may take for a while.
    options = config_file(tmp_path, idle_step_s=2.0)
    with optserve.local_server(options=options) as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        name = create(stub, "a", {"x": (2,)}).name
        with stream(stub, name) as idle:
            idle.send(begin(), chunk(0, 0, bytes(4)))
            _wait_until_logged(server.process.pid, "has made no progress for long")
            idle.send(chunk(0, 4, bytes(4)))
            assert details(idle.error())[0] == "STEP_TAKEN_OVER"
            idle.send(commit(), begin(), chunk(0, 0, bytes(8)), commit())
            assert idle.reply()[1].step == 1


@pytest.mark.parametrize("how", ["empty chunks", "by turns"])
def test_a_step_is_not_kept_by_messages_that_bring_nothing(how):
    """Only bytes that were missing are a move: not empty chunks, nor the same step taken over again and again."""
    clock, over = StoppedClock(), threading.Event()
    with app(clock, idle_step_s=0.4) as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        name = create(stub, "a", {"x": (2,)}).name
        with stream(stub, name) as first, stream(stub, name) as second, stream(stub, name) as other:
            first.send(begin("held"), chunk(0, 0, bytes(4)))
            _wait_until_under_way(stub, name)

            def hold() -> None:
                streams = itertools.cycle([first, second])
                # Slowly enough for the server to have taken them before it is their time.
                while not over.wait(0.05):
                    clock.seconds += 0.05
                    if how == "empty chunks":
                        first.send(chunk(0, 4, b""))
                    else:
                        next(streams).send(Request(abort=steps_pb2.Abort()), begin("held"))

            holding = threading.Thread(target=hold)
            holding.start()
            try:
                until = time.monotonic() + 20
                while time.monotonic() < until:
                    other.send(begin(), chunk(0, 0, bytes(8)), commit())
                    response = other.receive()
                    if response.HasField("chunk"):
                        break
                    assert details(response.error.status)[0] == "STEP_IN_PROGRESS"
                else:
                    pytest.fail("the step that brings nothing did not give way")
            finally:
                over.set()
                holding.join()


def test_a_client_that_has_stalled_goes_on_with_the_same_step(tmp_path):
    options = config_file(tmp_path, idle_step_s=0.2)
    first, second = np.array([1, 2], np.float32), np.array([3], np.float32)
    with optserve.local_server(options=options) as server, optserve.connect(server.target) as client:
        client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), {"x": first, "y": second})
        opt = client.optimizer("a", transport="grpc")
        with opt.begin_step() as step:
            step.send("x", first)
            _wait_until_logged(server.process.pid, "has made no progress for long")
            step.send("y", second)
        assert [update.tolist() for update in step.updates.values()] == [[-1, -2], [-3]]
        assert opt.current_step == 1


def test_a_step_of_many_small_tensors_takes_linear_time(stub, name):
    """Alternating dtypes, so that no two tensors are neighbours: 8,000 chunks of one element."""
    count = 8000
    optimizer = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd()),
        parameters=[optimizer_pb2.Parameter(name=f"{i}", data_type=DATA_TYPES[i % 2]) for i in range(count)],
    )
    stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer))
    with stream(stub, f"optimizers/{name}") as steps:
        steps.send(begin(), *(chunk(index, 0, bytes(4 + 4 * (index % 2))) for index in range(count)), commit())
        assert steps.reply()[1].step == 1


def test_the_number_of_optimizers_and_their_memory_are_limited(tmp_path):
    # 18 KiB for each and its parameter, beside the arrays.
    options = config_file(tmp_path, max_optimizers=2, max_state_bytes=2 * (18 << 10) + 1000, max_parameters=3)
    with optserve.local_server(options=options) as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE"):
            create(stub, "many", {f"x{index}": (1,) for index in range(4)})
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_FULL"):
            create(stub, "big", {"x": (84 + 1536,)})
        create(stub, "a", {"x": (40,)})
        create(stub, "b", {"x": (40,)})
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_FULL"):
            create(stub, "c", {"x": (1,)})
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name="optimizers/a"))
        create(stub, "c", {"x": (1,)})


def test_sigterm_lets_a_step_under_way_end_and_refuses_new_ones():
    with optserve.local_server() as server, grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        first, second = (create(stub, name, {"x": (2,)}).name for name in ("first", "second"))
        serving = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(serving).status == health_pb2.HealthCheckResponse.SERVING
        with stream(stub, first) as under_way, stream(stub, second) as idle:
            under_way.send(begin(), chunk(0, 0, bytes(4)), begin())
            assert details(under_way.error())[0] == "STEP_NOT_ENDED"  # so the server is in the middle of this stream
            under_way.send(commit(), begin(), chunk(0, 0, bytes(8)), chunk(0, 0, bytes(8)))
            assert details(under_way.error())[0] == "OVERLAPPING_CHUNK"
            under_way.send(commit(), begin("last"), chunk(0, 0, bytes(4)))
            _wait_until_under_way(stub, first)
            server.process.send_signal(signal.SIGTERM)
            assert next(serving).status == health_pb2.HealthCheckResponse.NOT_SERVING
            idle.send(begin())
            reason, _, _, retry_s = details(idle.error())
            assert reason == "DRAINING"
            assert retry_s
            under_way.send(chunk(0, 4, bytes(4)), commit())
            assert under_way.reply()[1].step == 1
        assert server.process.wait(10) == 0


def test_a_signal_that_another_thread_takes_stops_the_server_too():
    # As the system does where the main thread has only just been woken, for example after a SIGCONT.
    with optserve.local_server() as server:
        pid = server.process.pid
        thread = next(tid for tid in (int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()) if tid != pid)
        assert ctypes.CDLL(None, use_errno=True).tgkill(pid, thread, signal.SIGTERM) == 0
        assert server.process.wait(10) == 0


def _wait_until_under_way(stub, name: str) -> None:
    for _ in range(1000):
        with stream(stub, name) as probe:
            probe.send(begin(expected_step=1 << 40))
            if details(probe.error())[0] == "STEP_IN_PROGRESS":
                return
    pytest.fail("no step came under way")


def _wait_until_logged(pid: int, text: str) -> None:
    """Wait for a line on a process's standard error, which is a file."""
    deadline = time.monotonic() + 20
    while text not in Path(f"/proc/{pid}/fd/2").read_text():
        assert time.monotonic() < deadline, f"nothing logged {text!r}"


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process has held."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_stays_within_three_point_three_times_the_parameters(backend):
    size = 24_000_000
    constant = 40 * MIB
    with optserve.local_server(backend=backend) as server, optserve.connect(server.target) as client:
        # Everything that does not depend on the size happens once before.
        warm = client.create_optimizer("warm", optserve.Adadelta(), {"x": optserve.TensorSpec((1 << 20,))})
        warm.step({"x": np.ones(1 << 20, np.float32)})
        client.delete_optimizer("warm")
        before = peak_rss_bytes(server.process.pid)
        opt = client.create_optimizer("big", optserve.Adadelta(), {"x": optserve.TensorSpec((size,))})
        g = {"x": np.ones(size, np.float32)}
        out = opt.step(g)
        for _ in range(4):
            opt.step(g, out=out)
        used = peak_rss_bytes(server.process.pid) - before
    assert used <= 3.3 * 4 * size + constant
    assert used >= 3.0 * 4 * size * 0.95  # otherwise it is not the state that was measured


def test_a_server_whose_parent_dies_ends_too(tmp_path):
    import subprocess
    import sys

    import psutil

    script = (
        "import optserve, os\n"
        "server = optserve.local_server().__enter__()\n"
        "print(server.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid = int(parent.stdout)
    if psutil.pid_exists(pid):
        psutil.Process(pid).wait(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--durability", "sometimes"], "durability must be memory, snapshot or journal"),
        (["--durability", "journal"], "data_dir must be set if durability is journal"),
        (["--port", "70000"], "port must be 0 to 65535"),
        (["--config", "/nonexistent.toml"], "Cannot read the configuration"),
        (["--backend", "tpu"], "There is no backend 'tpu'"),
        (["--host", "203.0.113.1"], "Cannot listen on 203.0.113.1"),
        (["--data-dir", "/proc/optserve"], "The data folder /proc/optserve cannot be used"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_line(options, message):
    with pytest.raises(optserve.UnavailableError, match=message) as caught, optserve.local_server(options=options):
        pass
    # The end of a traceback has no other mark.
    assert 'File "' not in str(caught.value)


@pytest.mark.parametrize("setting", ["data_dir", "uds", "host"])
def test_a_setting_that_no_system_call_takes_is_named(tmp_path, setting):
    config = tmp_path / "optserve.toml"
    config.write_text(f'{setting} = "a\\u0000b"\n')
    with pytest.raises(optserve.UnavailableError, match=f"{setting} must not contain a null character") as caught:
        optserve.local_server(options=["--config", str(config)]).__enter__()
    # The end of a traceback has no other mark.
    assert 'File "' not in str(caught.value)


@pytest.mark.parametrize("error", ["OSError(24, 'Too many open files')", "ValueError('odd')", "RuntimeError('no')"])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_what_a_library_raises_at_the_start_is_a_line_too(error, level):
    """With --log-level debug where it happened is logged besides."""
    script = (
        "import optserve_server.app as app, sys\n"
        f"def run(*arguments, **options): raise {error}\n"
        "app.run = run\n"
        "from optserve_server.cli.serve import app as command\n"
        "command(sys.argv[1:], prog_name='optserve serve')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--log-level", level], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("optserve serve: ")
    assert ("Traceback" in done.stderr) == (level == "debug")


def test_an_unknown_setting_is_named(tmp_path):
    options = config_file(tmp_path, max_stream=3)
    with pytest.raises(optserve.UnavailableError, match="'max_stream', which is not a setting"):
        optserve.local_server(options=options).__enter__()


def test_steps_on_several_optimizers_run_in_parallel_threads(client, name):
    """Large steps of several optimizers at once: none disturbs another's bits."""
    size, threads = 400_000, 4
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(size).astype(np.float32) for _ in range(threads)]
    results: dict[int, bytes] = {}

    def train(index: int) -> None:
        opt = client.create_optimizer(f"{name}-{index}", optserve.Adadelta(), {"x": given[index]})
        for _ in range(5):
            results[index] = opt.step({"x": given[index]})["x"].tobytes()

    workers = [threading.Thread(target=train, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index in range(threads):
        alone = client.create_optimizer(f"{name}-alone-{index}", optserve.Adadelta(), {"x": given[index]})
        expected = b""
        for _ in range(5):
            expected = alone.step({"x": given[index]})["x"].tobytes()
        assert results[index] == expected


def test_more_calls_than_the_server_takes_at_a_time_are_made_in_the_end(tmp_path):
    config = tmp_path / "optserve.toml"
    config.write_text("max_streams = 1\nunary_threads = 1\n")
    refused: list[optserve.OptserveError] = []

    def call(client: optserve.Client) -> None:
        try:
            # Once, to see that it happens at all.
            client._connection.call_once(client._connection.stub.GetServerInfo, service_pb2.GetServerInfoRequest())
        except optserve.ResourceExhaustedError as error:
            refused.append(error)
        for _ in range(5):
            client.server_info()

    with (
        optserve.local_server(options=["--config", str(config)]) as server,
        optserve.connect(server.target, optserve.ClientConfig(timeout_s=60)) as client,
        ThreadPoolExecutor(400) as pool,
    ):
        while not refused:
            list(pool.map(call, [client] * 400))
    assert {error.retry_after_s for error in refused} == {1.0}


def test_calls_that_are_over_are_no_streams_of_their_connection_any_more(tmp_path):
    """gRPC refuses streams beyond the limit for as long as anything refers to calls that have been."""
    config = tmp_path / "optserve.toml"
    config.write_text("max_connection_streams = 20\n")
    with (
        optserve.local_server(backend="numpy", options=["--config", str(config)]) as server,
        optserve.connect(server.target) as client,
    ):
        client.create_optimizer("a", optserve.Sgd(), {"x": np.ones(3, np.float32)}, hosted=True)
        for _ in range(100):
            client._connection.call_once(client._connection.stub.GetServerInfo, service_pb2.GetServerInfoRequest())
            opt = client.optimizer("a")
            opt.pull_parameters()
            opt.step({"x": np.ones(3, np.float32)})
            opt.close()


def test_a_socket_that_a_server_listens_at_is_not_taken_over(tmp_path):
    path = tmp_path / "socket"
    options = ["--uds", str(path)]
    with optserve.local_server(backend="numpy", options=options) as first:
        message = "another server listens there"
        with (
            pytest.raises(optserve.UnavailableError, match=message),
            optserve.local_server(backend="numpy", options=options),
        ):
            pass
        with optserve.connect(first.target) as client:
            assert client.server_info().backend
        first.process.kill()
        first.process.wait()
        # What is left of a server that was killed is in nobody's way.
        with (
            optserve.local_server(backend="numpy", options=options) as second,
            optserve.connect(second.target) as client,
        ):
            assert client.server_info().backend


def test_a_path_that_is_no_socket_is_not_replaced(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    with (
        pytest.raises(optserve.UnavailableError, match="Cannot listen on unix:"),
        optserve.local_server(backend="numpy", options=["--uds", str(path)]),
    ):
        pass
    assert path.read_text() == "precious"


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_a_host_may_be_an_ipv6_address(host):
    with optserve.local_server(backend="numpy", options=["--host", host]) as server:
        port = int(server.target.rsplit(":", 1)[1])
        assert server.target == ("[::]" if host == "::" else "[::1]") + f":{port}"
        with optserve.connect(f"[::1]:{port}") as client:
            assert client.server_info().backend


@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB])
def test_chunks_as_large_as_the_limits_leave_room_for_their_headers(tmp_path, size):
    """A chunk of the limit's size is a longer message: 4194346 bytes where 4194304 were accepted."""
    options = config_file(tmp_path, max_chunk_bytes=size, preferred_chunk_bytes=size)
    config = optserve.ClientConfig(max_receive_bytes=8 * MIB, max_chunk_bytes=8 * MIB)
    x = {"x": np.zeros(size // 4, np.float32)}
    with optserve.local_server(backend="numpy", options=options) as server:
        with optserve.connect(server.target, config) as client:
            client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), x)
            client.optimizer("a", transport="grpc").step(x)
            client.create_optimizer("b", optserve.Sgd(), x, hosted=True, consistency=optserve.Async())
            with client.worker("b", "w", transport="grpc") as worker:
                worker.pull()
                worker.step(x)
        # A client of another language takes 4 MiB unless it is told more.
        with grpc.insecure_channel(server.target) as channel:
            stub = service_pb2_grpc.OptimizerServiceStub(channel)
            pulled = stub.PullParameters(replicas_pb2.PullParametersRequest(name="optimizers/b"))
            assert sum(len(message.data) for message in pulled) == size
            exported = stub.ExportState(checkpoints_pb2.ExportStateRequest(name="optimizers/b"))
            assert sum(len(message.data) for message in exported) == size


def test_a_log_does_not_steer_the_terminal_that_shows_it():
    """Whatever a path, a client or a library puts into it."""
    program = (
        "import logging, sys; from optserve_server.cli import serve; serve.log_to_stderr('info'); "
        "logging.getLogger('optserve_server.x').info('%s', '\\x1b]0;title\\x07\\x9b31m\\rline [/b]')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert r"INFO optserve_server.x \x1b]0;title\x07\x9b31m\rline [/b]" in done.stderr
    assert not set(done.stderr) & set("\x1b\x07\x9b\r")
