"""Many workers, cut connections, killed workers and a killed server: every gradient counts once, and none twice."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import optserve
from backend_under_test import BACKEND
from client.proxy import Proxy
from durability.doomed_worker import CONFIG, total, work
from durability.test_kill import free_port
from optserve.optimizer import TransportName

WORKERS = int(os.environ.get("OPTSERVE_WORKERS", "200"))
STEPS = 50
CLIENTS = 8
DOOMED = Path(__file__).with_name("doomed_worker.py")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("consistency", "workers", "processes"),
    [
        (optserve.Async(lease_s=5), WORKERS, 3),
        (optserve.Bounded(3, lease_s=5), WORKERS // 4, 3),
        (optserve.Sync(16, lease_s=5), 16, 0),
    ],
    ids=["async", "bounded", "sync"],
)
def test_the_sum_is_exact_whatever_dies(tmp_path, consistency, workers, processes):
    port = free_port()
    command = [sys.executable, "-m", "optserve_server", "--port", str(port), "--data-dir", str(tmp_path / "data")]
    server = subprocess.Popen([*command, "--backend", "numpy"])
    proxy = Proxy(f"127.0.0.1:{port}")
    failures: list[BaseException] = []
    clients: list[optserve.Client] = []
    try:
        direct = optserve.connect(f"127.0.0.1:{port}", CONFIG)
        clients.append(direct)
        zero = {"w": np.zeros((20, 5), np.float32), "b": np.zeros(3, np.float64)}
        opt = direct.create_optimizer("a", optserve.Sgd(learning_rate=1.0), zero, hosted=True, consistency=consistency)
        clients += [optserve.connect(proxy.target, CONFIG) for _ in range(CLIENTS)]

        # Nobody passes the half before the server is about to be killed, so that the kill falls among steps.
        halfway, killing = threading.Event(), threading.Event()

        def before(step: int) -> None:
            if step >= STEPS // 2 and not killing.is_set():
                halfway.set()
                assert killing.wait(200)

        def run(number: int) -> None:
            try:
                work(clients[1 + number % CLIENTS], "a", f"w{number}", STEPS, number, before)
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

        def run_process(number: int) -> None:
            arguments = [sys.executable, DOOMED, f"127.0.0.1:{port}", "a", f"p{number}", str(STEPS), str(number)]
            rng = random.Random(number)
            for kills in range(4):
                process = subprocess.Popen(arguments)
                try:
                    code = process.wait(rng.uniform(1.0, 2.5) if kills < 3 else 200)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    continue
                if code != 0:
                    failures.append(RuntimeError(f"worker p{number} ended with {code}"))
                return

        threads = [threading.Thread(target=run, args=(number,)) for number in range(workers)]
        threads += [threading.Thread(target=run_process, args=(number,)) for number in range(processes)]
        for thread in threads:
            thread.start()
        # Of sync a step is the mean over all workers, which integers in 16 workers leave exact.
        share = workers if isinstance(consistency, optserve.Sync) else 1
        expected_steps = STEPS * (workers + processes) // share
        killed, cuts = False, 0
        while any(thread.is_alive() for thread in threads):
            # The pace at which connections are cut.
            time.sleep(0.25)
            if cuts < 20:
                cuts += 1
                proxy.cut()
            if not killed and halfway.is_set():
                killed = True
                killing.set()
                server.kill()
                server.wait()
                server = subprocess.Popen([*command, "--backend", BACKEND])
        if failures:
            raise failures[0]
        assert killed
        assert cuts
        found = opt.pull_parameters()
        assert found.step == expected_steps
        expected = sum(total(STEPS, number) for number in [*range(workers), *range(processes)]) / share
        assert all(np.all(x == expected) for x in found.arrays.values())
    finally:
        proxy.close()
        for client in clients:
            client.close()
        server.terminate()
        server.wait(30)


class Doomed:
    """A server with a data folder, on a port that stays the same when it is killed and started anew."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.target = f"127.0.0.1:{self.port}"
        options = ["--port", str(self.port), "--data-dir", str(folder), "--backend", "numpy"]
        self._command = [sys.executable, "-m", "optserve_server", *options]
        self._process = subprocess.Popen(self._command)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process = subprocess.Popen(self._command)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def doomed(tmp_path) -> Iterator[Doomed]:
    server = Doomed(tmp_path / "data")
    try:
        yield server
    finally:
        server.stop()


class Gradients:
    """Gradients that are told apart in x: each adds 1 to an element of its own.

    Attributes:
        fates: How often each one may have been applied, by what its step has answered.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.fates: dict[int, set[int]] = {}
        self._lock = threading.Lock()

    def step(self, worker: optserve.Worker) -> None:
        with self._lock:
            number = len(self.fates)
            self.fates[number] = {0}
        if number >= self.count:
            return
        gradient = np.zeros(self.count, np.float32)
        gradient[number] = -1
        # What raises another error than these may have been applied.
        fate = {0, 1}
        try:
            worker.step({"x": gradient})
            fate = {1}
        except optserve.WorkerReplacedError:
            fate = {0}
            raise
        finally:
            self.fates[number] = fate

    def check(self, x: np.ndarray) -> None:
        wrong = {
            number: x[number] for number, fate in self.fates.items() if number < self.count and x[number] not in fate
        }
        assert not wrong


def run_lives(threads: int, live: Callable[[int], None]) -> None:
    """Let lives come and go side by side, and raise what one of them has raised."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            live(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@contextmanager
def life_of(target: str, transport: TransportName) -> Iterator[tuple[optserve.Client, optserve.Worker]]:
    """A life of the one worker, in a client of its own."""
    with optserve.connect(target, CONFIG) as client, client.worker("a", "same", transport=transport) as worker:
        yield client, worker


@pytest.mark.timeout(200)
@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("consistency", [optserve.Async(lease_s=5), optserve.Sync(1, lease_s=5)], ids=["async", "sync"])
def test_each_gradient_counts_once_or_raises_where_lives_of_one_name_overlap(doomed, consistency, transport):
    gradients = Gradients(120)
    rng = random.Random(1)
    replaced = []
    with optserve.connect(doomed.target, CONFIG) as client:
        x = {"x": np.zeros(gradients.count, np.float32)}
        opt = client.create_optimizer("a", optserve.Sgd(1.0), x, hosted=True, consistency=consistency)

        # Of the first lives only the last one to begin is not over when all of them have begun.
        begun = threading.Barrier(3, timeout=60)

        def live(number: int) -> None:
            first = True
            while len(gradients.fates) < gradients.count:
                try:
                    with life_of(doomed.target, transport) as (own, worker):
                        if first:
                            first = False
                            begun.wait()
                        worker.pull()
                        with suppress(optserve.StepInDoubtError, optserve.GradientLateError):
                            for _ in range(rng.randrange(1, 8)):
                                gradients.step(worker)
                        if rng.random() < 0.5:
                            # As if the process had died: it takes no leave.
                            own.close()
                except optserve.WorkerReplacedError:
                    replaced.append(number)
                # Whoever comes here first: the lives under way cannot make all that is left.
                if len(gradients.fates) > gradients.count // 2 and to_be_killed.acquire(blocking=False):
                    doomed.kill()

        to_be_killed = threading.Lock()
        run_lives(3, live)
        gradients.check(opt.pull_parameters().arrays["x"])
    assert to_be_killed.locked()
    assert replaced
    # Most got through.
    assert sum(fate == {1} for fate in gradients.fates.values()) > gradients.count // 4


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_life_that_comes_back_after_a_kill_does_not_take_anothers_step_for_its_own(doomed, transport):
    with optserve.connect(doomed.target, CONFIG) as client:
        opt = client.create_optimizer(
            "a", optserve.Sgd(1.0), {"x": np.zeros(1)}, hosted=True, consistency=optserve.Async()
        )
        with life_of(doomed.target, transport) as (_, first):
            first.pull()
            first.step({"x": -np.ones(1)})
            with life_of(doomed.target, transport) as (own, second):
                second.pull()
                second.step({"x": np.full(1, -10.0)})
                own.close()
            # The server that comes back knows of the second life by its step only.
            doomed.kill()
            with pytest.raises(optserve.StepInDoubtError, match="Another life of worker 'same' has made step 2"):
                first.step({"x": np.full(1, -100.0)})
            first.refresh()
            first.pull()
            first.step({"x": np.full(1, -1000.0)})
            assert first.steps_made == 3
        assert opt.pull_parameters().arrays["x"] == 1011


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_quick_restarts_with_equal_counts_lose_and_double_nothing(doomed, transport):
    """Each life begins at the count of the one before it, which makes steps as well until it dies."""
    gradients = Gradients(40)
    with optserve.connect(doomed.target, CONFIG) as client:
        x = {"x": np.zeros(gradients.count, np.float32)}
        opt = client.create_optimizer("a", optserve.Sgd(1.0), x, hosted=True, consistency=optserve.Async(lease_s=5))
        proxy = Proxy(doomed.target)
        try:
            while len(gradients.fates) < gradients.count:
                with life_of(proxy.target, transport) as (own, worker):
                    worker.pull()
                    dying = threading.Thread(target=step_of_the_dying, args=(gradients, worker))
                    dying.start()
                    if len(gradients.fates) % 3 == 0:
                        proxy.cut()
                    with life_of(doomed.target, transport) as (_, next_worker):
                        next_worker.pull()
                        for _ in range(2):
                            try:
                                gradients.step(next_worker)
                            except optserve.StepInDoubtError:
                                next_worker.refresh()
                            step_of_the_dying(gradients, worker)
                        own.close()
                    dying.join(60)
        finally:
            proxy.close()
        gradients.check(opt.pull_parameters().arrays["x"])


def step_of_the_dying(gradients: Gradients, worker: optserve.Worker) -> None:
    with suppress(optserve.OptserveError):
        gradients.step(worker)
