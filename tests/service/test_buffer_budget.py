"""The room that the buffers of workers share: who waits, who gives way, and who is told to come back."""

import itertools
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

import optserve
from clocks import TellingClock
from optserve._common.malloc import KEPT_BYTES
from optserve.v1 import service_pb2, service_pb2_grpc, steps_pb2
from optserve_server.app import ARENAS, App
from optserve_server.domain.config import ServerConfig
from service.attacks import SERVICE, raw, used, wait_until
from service.wire_client import begin, chunk, commit, create, details, stream
from service.worker_harness import HOSTED, QUICK, X, config_of, place, report, run_all, shared

STEPS = SERVICE + "StreamSteps"
HEAP_BYTES = 64 << 20


@pytest.mark.timeout(180)
def test_four_hundred_clients_against_room_for_a_hundred_all_finish_in_the_end(tmp_path):
    count, steps, size = 400, 5, 100_000
    room = 100 * 4 * size
    options = config_of(tmp_path, max_optimizer_staged_bytes=room, max_pull_bytes=room, max_streams=count + 10)
    gradient = {"x": np.full(size - 1, -1, np.float32), "y": np.full(1, -1, np.float32)}
    held, go, done = threading.Semaphore(0), threading.Event(), threading.Event()
    with ExitStack() as stack:
        server = stack.enter_context(optserve.local_server(options=options))
        clients = [stack.enter_context(optserve.connect(server.target, QUICK)) for _ in range(8)]
        channel = stack.enter_context(grpc.insecure_channel(server.target))
        one, zero = optserve.Sgd(learning_rate=1.0), {name: np.zeros_like(grad) for name, grad in gradient.items()}
        opt = clients[0].create_optimizer("a", one, zero, hosted=True, consistency=optserve.Async())

        def work(number: int) -> None:
            with clients[number % 8].worker("a", f"w{number}", transport="grpc") as worker:
                worker.pull()
                for turn in range(steps):
                    if turn == 0 and number < 100:
                        # A hundred that do not go on take all the room there is.
                        with worker._optimizer.begin_step(timeout_s=120) as step:
                            step.send("y", gradient["y"])
                            held.release()
                            assert go.wait(60)
                            step.send("x", gradient["x"])
                    else:
                        worker.step(gradient, timeout_s=120)

        def be_refused() -> None:
            stub = service_pb2_grpc.OptimizerServiceStub(channel)
            report(stub, "optimizers/a", "refused")
            for _ in range(100):
                held.acquire(timeout=60)
            try:
                with stream(stub, "optimizers/a", worker="refused") as steps:
                    reason, metadata, retry_s = "MISSING_CHUNK", {}, None
                    # Until the last of the hundred has begun.
                    while reason == "MISSING_CHUNK":
                        steps.send(begin(), commit())
                        reason, metadata, _, retry_s = details(steps.error())
                assert (reason, retry_s) == ("STAGING_FULL", 0.5)
                assert metadata["limit"] == str(room)
            finally:
                go.set()

        process = psutil.Process(server.process.pid)
        before = most = process.memory_info().rss

        def watch() -> None:
            nonlocal most
            while not done.wait(0.05):
                most = max(most, process.memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            run_all([be_refused, *(lambda number=number: work(number) for number in range(count))])
        finally:
            done.set()
            watching.join()
        found = opt.pull_parameters()
        assert found.step == count * steps
        assert all(np.all(array == count * steps) for array in found.arrays.values())
        # Room for steps and pulls; of each stream a message on the wire, one that came, one that goes, a thread; and
        # freed memory that the allocator keeps, which depends on how the threads come to run.
        assert most - before < 2 * room + count * (3 * 4 * size + 200_000) + ARENAS * KEPT_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_hundreds_of_threads_share_a_few_arenas_that_keep_freed_memory(tmp_path):
    """glibc would make 8 for each processor."""
    with (
        optserve.local_server(backend="numpy", options=config_of(tmp_path, receive_s=600)) as server,
        raw(server.target) as (connection,),
    ):
        threads = used(server).threads
        for _ in range(100):
            connection.call(STEPS)
        wait_until(lambda: used(server).threads >= threads + 100)
        heaps = heaps_of(server.process.pid)
    assert 1 <= len(heaps) < ARENAS


def heaps_of(pid: int) -> list[int]:
    """Where the heaps of glibc begin that are not its first: 64 MiB at a multiple of that, their end still reserved.

    Other memory may begin at such a multiple by chance; it has nothing reserved behind it.
    """
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in line[0].split("-")), line[1], len(line) == 5) for line in lines]
    return [
        begin
        for (begin, end, access, anonymous), (following, until, reserved, _) in itertools.pairwise(ranges)
        if begin % HEAP_BYTES == 0 and access == "rw-p" and anonymous
        if following == end and reserved == "---p" and until >= begin + HEAP_BYTES
    ]


def test_workers_of_one_optimizer_leave_room_for_those_of_another(tmp_path):
    with (
        optserve.local_server(options=config_of(tmp_path, max_staged_bytes=32)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        names = [create(stub, name, {"x": (2,)}, **HOSTED).name for name in ("a", "b")]
        for made in names:
            place(stub, made, X)
            for worker in ("one", "two", "three"):
                report(stub, made, worker)
        with ExitStack() as stack:
            a = [stack.enter_context(stream(stub, names[0], worker=worker)) for worker in ("one", "two", "three")]
            b = stack.enter_context(stream(stub, names[1], worker="one"))
            # Two that do not go on, which is half of the room.
            for under_way in a[:2]:
                under_way.send(begin(), chunk(0, 0, bytes(4)))
            for _ in range(3):
                b.send(begin(), chunk(0, 0, bytes(8)), commit())
                b.reply()
            # One that keeps a reply gives way within its own share first.
            a[2].send(begin(), chunk(0, 0, bytes(8)), commit())
            reason, _, _, retry_s = details(a[2].error())
            assert (reason, retry_s) == ("STAGING_FULL", 0.5)
            b.send(begin(), chunk(0, 0, bytes(8)), commit())
            b.reply()


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_worker_that_waits_for_another_gives_its_room_up_to_it(transport):
    size = 1000
    # Room for one of the two. In this process, so that it can be seen who is waiting.
    clock = TellingClock()
    app = App(ServerConfig(port=0, backend="numpy", max_optimizer_staged_bytes=4 * size), clock=clock)
    app.start()
    try:
        with optserve.connect(app.target, QUICK) as client:
            x, gradient = {"x": np.zeros(size, np.float32)}, {"x": np.full(size, -1, np.float32)}
            one = optserve.Sgd(learning_rate=1.0)
            opt = client.create_optimizer("a", one, x, hosted=True, consistency=optserve.Bounded(0))
            with (
                client.worker("a", "fast", transport=transport) as fast,
                client.worker("a", "slow", transport=transport) as slow,
            ):
                for worker in (fast, slow):
                    worker.pull()
                fast.step(gradient)
                clock.somebody_waits.clear()
                ahead = threading.Thread(target=fast.step, args=(gradient,), kwargs={"timeout_s": 60})
                ahead.start()
                assert clock.somebody_waits.wait(30)
                for _ in range(2):
                    slow.step(gradient, timeout_s=20)
                ahead.join(30)
                assert not ahead.is_alive()
                assert fast.steps_made == slow.steps_made == 2
            assert np.all(opt.pull_parameters().arrays["x"] == 4)
    finally:
        app.stop()


def test_more_workers_in_a_step_than_there_is_room_for_are_refused(tmp_path):
    with (
        optserve.local_server(options=config_of(tmp_path, max_optimizer_staged_bytes=2 * 264)) as server,
        optserve.connect(server.target) as client,
    ):
        shared(client, "two", optserve.Sync(2))
        with pytest.raises(optserve.InvalidArgumentError, match="max_optimizer_staged_bytes") as caught:
            shared(client, "three", optserve.Sync(3))
        assert caught.value.field == "optimizer.consistency.sync.workers"


def test_workers_share_memory_as_long_as_there_is_room(tmp_path):
    size = 100_000
    array_bytes = 4 * size
    # x, the buffer of the optimizer itself, and one segment.
    options = config_of(tmp_path, max_state_bytes=3 * array_bytes + 100_000, max_staged_bytes=10 * array_bytes)
    with optserve.local_server(options=options) as server, optserve.connect(server.target) as client:
        x, gradient = {"x": np.zeros(size, np.float32)}, {"x": np.full(size, -1, np.float32)}
        one = optserve.Sgd(learning_rate=1.0)
        opt = client.create_optimizer("a", one, x, hosted=True, consistency=optserve.Async())

        def used() -> int:
            return next(iter(client.list_optimizers())).memory_bytes

        assert used() == 2 * array_bytes
        with client.worker("a", "second") as second:
            with client.worker("a", "first") as first:
                assert first.transport[0] == "shm"
                assert second.transport[0] == "grpc"
                assert "its memory is full" in second.transport[1]
                assert 3 * array_bytes <= used() < 3 * array_bytes + 10_000
                for worker in (first, second):
                    worker.pull()
                    worker.step(gradient)
                    with pytest.raises(optserve.InvalidArgumentError, match="nan"):
                        worker.step({"x": np.full(size, np.nan, np.float32)})
            assert np.all(opt.pull_parameters().arrays["x"] == 2)
            # The stream of the one that has left may not have ended yet.
            wait_until(lambda: used() == 2 * array_bytes)


def test_who_finds_no_room_is_told_to_come_back(tmp_path):
    config = tmp_path / "optserve.toml"
    config.write_text("max_staged_bytes = 10\n")
    with (
        optserve.local_server(options=["--config", str(config)]) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        made = create(stub, "a", {"x": (2,)}, **HOSTED).name
        place(stub, made, X)
        for worker in ("one", "two"):
            report(stub, made, worker)
        with stream(stub, made, worker="one") as one, stream(stub, made, worker="two") as two:
            one.send(begin(), chunk(0, 0, bytes(4)))
            # Until the step of the one is under way, those of the other are made.
            response = steps_pb2.StreamStepsResponse()
            while not response.HasField("error"):
                two.send(begin(), chunk(0, 0, bytes(8)), commit())
                response = two.receive()
                while not (response.HasField("result") or response.HasField("error")):
                    response = two.receive()
            reason, _, _, retry_s = details(response.error.status)
            assert (reason, retry_s) == ("STAGING_FULL", 0.5)
            one.send(chunk(0, 4, bytes(4)), commit())
            one.reply()
            two.send(begin(), chunk(0, 0, bytes(8)), commit())
            two.reply()


def test_room_comes_back_after_failed_begins_idle_steps_and_deletions(tmp_path):
    with (
        optserve.local_server(options=config_of(tmp_path, max_staged_bytes=8, idle_step_s=0.3)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        made = create(stub, "a", {"x": (2,)}, **HOSTED).name
        place(stub, made, X)
        for worker in ("one", "two", "three"):
            report(stub, made, worker)
        with ExitStack() as stack:
            one, two, three = (stack.enter_context(stream(stub, made, worker=w)) for w in ("one", "two", "three"))
            one.send(begin(parameters_step=9), commit())
            assert details(one.error())[0] == "INVALID_FIELD"
            # It has not moved for long, and its room is another's.
            two.send(begin(), chunk(0, 0, bytes(4)))
            for _ in range(2):
                three.send(begin(), chunk(0, 0, bytes(8)), commit())
                three.reply()
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=made))
        again = create(stub, "b", {"x": (2,)}, **HOSTED).name
        place(stub, again, X)
        report(stub, again, "one")
        with stream(stub, again, worker="one") as steps:
            steps.send(begin(), chunk(0, 0, bytes(8)), commit())
            steps.reply()
