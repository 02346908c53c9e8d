"""Parameter servers of other projects that do the same job: ADADELTA on the gradients that a worker sends.

Each holds the parameters, takes a gradient, steps torch.optim.Adadelta and answers with the new parameters: the same
bytes each way as ours.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

RAY_WARM_UP = 20
"""Steps."""


class ParameterServer:
    """The same for all: one flat parameter, stepped by torch."""

    def __init__(self, size: int) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(size))
        self.optimizer = torch.optim.Adadelta([self.parameter], lr=1.0, rho=0.95, eps=1e-6)

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """Apply a gradient; returns the parameters."""
        self.parameter.grad = gradient
        self.optimizer.step()
        return self.parameter.detach()


_servers: dict[int, ParameterServer] = {}


def rpc_step(size: int, gradient: torch.Tensor) -> torch.Tensor:
    """Runs in the server's process of torch.distributed.rpc."""
    if size not in _servers:
        _servers.clear()
        _servers[size] = ParameterServer(size)
    return _servers[size].step(gradient)


def _serve_rpc() -> None:
    from torch.distributed import rpc

    rpc.init_rpc("server", rank=1, world_size=2)
    rpc.shutdown()


def _call_rpc(size: int) -> None:
    """Runs in the worker's process: a step for each line of standard input, answered by a line when it is done."""
    from torch.distributed import rpc

    rpc.init_rpc("worker", rank=0, world_size=2)
    gradient, parameters = (
        torch.from_numpy(np.random.default_rng(0).standard_normal(size, np.float32)),
        torch.zeros(size),
    )
    for _ in sys.stdin:
        parameters.copy_(rpc.rpc_sync("server", rpc_step, args=(size, gradient)))
        print("done", flush=True)
    rpc.shutdown()


@dataclass(frozen=True)
class Peer:
    """Another parameter server.

    Attributes:
        step: Makes one step.
        pause: Holds its processes still, before something else is timed.
        resume: Lets them go on.
    """

    step: Callable[[], object]
    pause: Callable[[], object] = lambda: None
    resume: Callable[[], object] = lambda: None


@contextmanager
def torch_rpc(size: int) -> Iterator[Peer | None]:
    """A parameter server of torch.distributed.rpc and its worker, each in a process of its own.

    Both wait for messages by asking for them all the time, and take all of two cores even when nothing is to be done.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = "from benchmarks import peers; peers."
    server = subprocess.Popen([sys.executable, "-c", f"{code}_serve_rpc()"], env=environment)
    worker = subprocess.Popen(
        [sys.executable, "-c", f"{code}_call_rpc({size})"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def tell(number: signal.Signals) -> None:
        for process in (server, worker):
            process.send_signal(number)

    def step() -> None:
        if worker.stdin is None or worker.stdout is None:
            raise RuntimeError("the worker has no pipes")
        worker.stdin.write("step\n")
        if worker.stdout.readline() != "done\n":
            raise RuntimeError("the worker of torch.distributed.rpc has failed")

    try:
        yield Peer(step, lambda: tell(signal.SIGSTOP), lambda: tell(signal.SIGCONT))
    finally:
        tell(signal.SIGCONT)
        # Its standard input ends, and with it both.
        worker.communicate()
        server.wait()


@contextmanager
def ray_actor(size: int) -> Iterator[Peer | None]:
    """A parameter server that is a Ray actor; None where Ray is not installed."""
    if find_spec("ray") is None:
        yield None
        return
    # It is no part of the development environment, so nothing is known of its types there.
    ray: Any = import_module("ray")

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)

    @ray.remote
    class Actor:
        def __init__(self, size: int) -> None:
            self._server = ParameterServer(size)

        def step(self, gradient: np.ndarray) -> np.ndarray:
            # Ray gives read-only views of its object store, which torch must not write to.
            return self._server.step(torch.from_numpy(gradient.copy())).numpy()

    actor = Actor.remote(size)
    gradient = np.random.default_rng(0).standard_normal(size, np.float32)
    parameters = np.zeros_like(gradient)

    def step() -> None:
        np.copyto(parameters, ray.get(actor.step.remote(gradient)))

    try:
        # Its object store is twice as slow until every page of it has been used.
        for _ in range(RAY_WARM_UP):
            step()
        yield Peer(step)
    finally:
        ray.shutdown()
