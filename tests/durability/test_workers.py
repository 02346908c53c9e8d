"""Many workers, cut connections, killed workers and a killed server: every gradient counts once, and none twice."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import optserve
from client.proxy import Proxy
from durability.doomed_worker import CONFIG, total, work
from durability.test_kill import free_port

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

        def run(number: int) -> None:
            try:
                work(clients[1 + number % CLIENTS], "a", f"w{number}", STEPS, number)
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
            time.sleep(0.25)
            if not killed and opt.pull_parameters().step > expected_steps // 2:
                killed = True
                server.kill()
                server.wait()
                server = subprocess.Popen([*command, "--backend", "numba"])
            elif cuts < 20:
                cuts += 1
                proxy.cut()
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
