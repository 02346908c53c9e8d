"""kill -9 at any instant: nothing acknowledged is lost, nothing is applied twice, every bit is the same."""

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optserve
from backend_under_test import BACKEND

DOOMED = Path(__file__).with_name("doomed_server.py")
SIZE = 60_000  # 240 kB of gradients: a snapshot is due every few steps
MOST_ADDED = 5
KILLS = int(os.environ.get("OPTSERVE_KILLS", "50"))
CONFIG = optserve.ClientConfig(initial_backoff_s=0.02, max_backoff_s=0.1, step_timeout_s=150, connect_timeout_s=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def gradient(step: int, added: int = 0) -> dict[str, np.ndarray]:
    """The gradient of a step, after so many parameters were added."""
    rng = np.random.default_rng(step)
    return {
        "w": rng.standard_normal((SIZE // 100, 100)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float64),
        **{f"p{number}": new_parameter(step, number) for number in range(added)},
    }


def step_options(turn: int, *, hosted: bool, groups: int) -> dict[str, Any]:
    """Some steps have hyper-parameters of their own, as those of a client that has a schedule; some for each group."""
    if turn % 3 == 0:
        return {}
    rate = {"learning_rate": 1.0 / turn}
    if turn % 3 == 1:
        return {"hyperparameters": rate | ({"weight_decay": 0.02} if hosted else {}), "with_gradient_norm": True}
    return {"hyperparameters": [{"rho": 0.5, "eps": 1e-3} | rate, *({"rho": 1 / (3 + i)} for i in range(groups))]}


def new_parameter(step: int, number: int) -> np.ndarray:
    rng = np.random.default_rng([step, number])
    return rng.standard_normal(1000 * number).astype(np.float64 if number % 2 else np.float32)


class Supervisor:
    """Keeps a server running: one that is doomed after another, then one that is not."""

    def __init__(self, folder: Path, kills: int, seed: int, max_calls: int) -> None:
        config = folder / "optserve.toml"
        config.write_text("segment_bytes = 1048576\nsnapshot_bytes = 1048576\n")
        self.port = free_port()
        self._options = ["--port", str(self.port), "--data-dir", str(folder / "data"), "--backend", "numpy"]
        self._options += ["--config", str(config), "--log-level", "info"]
        self._kills, self._seed, self._max_calls = kills, seed, max_calls
        self._log = folder / "log"
        self.killed = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.failure = ""
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._log.open("wb") as log:
            while self.killed < self._kills and not self.failure:
                command = [sys.executable, DOOMED, str(self._seed + self.killed), str(self._max_calls), *self._options]
                self.process = subprocess.Popen(command, stderr=log)
                code = self.process.wait()
                if code != -9:
                    self.failure = f"server {self.killed} ended with {code}"
                self.killed += 1
            self.process = subprocess.Popen([sys.executable, "-m", "optserve_server", *self._options], stderr=log)
            self.done.set()

    def stop(self) -> str:
        """End the last server in order; returns the log of all."""
        self.done.wait(10)
        if self.process is not None:
            self.process.terminate()
            assert self.process.wait(30) == 0
        return self._log.read_text()


@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.parametrize(
    ("max_calls", "hosted"), [(20, False), (90, False), (36, True)], ids=["early", "late", "hosted"]
)
def test_kills_within_any_call_to_the_disk_leave_no_trace(client, name, tmp_path, max_calls, hosted):
    """`early` dies mostly in recovery and first steps, `late` mostly in steps and snapshots.

    A start and its first step take eleven calls to the disk.
    """
    kills = -(-KILLS // 3)
    options = {"hosted": hosted, "weight_decay": 0.01 if hosted else 0.0}
    supervisor = Supervisor(tmp_path, kills, seed=1000 * max_calls, max_calls=max_calls)
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), gradient(0), **options)
    config = replace(CONFIG, transport="shm" if max_calls > 50 else "grpc")
    shaky_client = optserve.connect(f"127.0.0.1:{supervisor.port}", config)
    while True:
        try:
            opt = shaky_client.create_optimizer("survivor", optserve.Adadelta(), gradient(0), **options)
            break
        except optserve.AlreadyExistsError:
            opt = shaky_client.optimizer("survivor")
            if hosted:
                with suppress(optserve.FailedPreconditionError):
                    opt.push_parameters(gradient(0))
            break
    turn, expected, added = 0, {}, 0
    while not supervisor.done.is_set() or turn % 5:
        if turn % 3 == 1 and added < MOST_ADDED:
            # Neither lost nor made twice, and in between come steps with them and restarts.
            for each in (undisturbed, opt):
                # Every second one has a group of its own.
                groups = [optserve.Group([f"p{added}"], {"learning_rate": 0.5})] if added % 2 else []
                each.add_parameters({f"p{added}": new_parameter(0, added)}, groups=groups)
                if max_calls > 50:
                    # One from before could not be restored.
                    each.save_checkpoint("c", overwrite=True)
            added += 1
        given, options = gradient(turn, added), step_options(turn, hosted=hosted, groups=added // 2)
        expected, update = undisturbed.step(given, **options), opt.step(given, **options)
        assert all(update[key].tobytes() == expected[key].tobytes() for key in given), f"turn {turn}"
        turn += 1
        # Checkpoints and restores have to survive as well, and must not be made twice either. One takes about ten
        # calls to the disk, more than an early death allows.
        for each in (undisturbed, opt) if max_calls > 50 else ():
            if turn % 7 == 3:
                each.save_checkpoint("c", overwrite=True)
            if turn % 11 == 0:
                each.restore_checkpoint("c")
        assert opt.current_step == undisturbed.current_step
    assert not supervisor.failure, supervisor.failure
    shaky_client.close()
    log = supervisor.stop()
    assert supervisor.killed == kills
    assert "snapshot" in log or max_calls < 50
    # What the folder holds now, once more and from the beginning.
    with optserve.local_server(tmp_path / "data", backend=BACKEND) as again, optserve.connect(again.target) as second:
        opt = second.optimizer("survivor")
        assert opt.current_step == undisturbed.current_step
        if turn % 11 or max_calls < 50:
            last = opt.replay()
            assert all(last[key].tobytes() == expected[key].tobytes() for key in last)
        given = gradient(turn, added)
        assert added >= 2
        if hosted:
            held, own = opt.pull_parameters(), undisturbed.pull_parameters()
            assert held.step == own.step
            assert all(held.arrays[key].tobytes() == own.arrays[key].tobytes() for key in given)
        assert opt.step(given)["w"].tobytes() == undisturbed.step(given)["w"].tobytes()
