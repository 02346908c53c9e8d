"""Parameter servers of other projects that do the same job: ADADELTA on the gradients that a worker sends.

Each holds the parameters, takes a gradient, steps torch.optim.Adadelta and answers with the new parameters: the same
bytes each way as ours. Each is a context manager that gives a call which makes one step.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch


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


@contextmanager
def torch_rpc() -> Iterator[Callable[[np.ndarray], Callable[[], object]]]:
    """A parameter server of torch.distributed.rpc, in a process of its own; gives a maker of steps."""
    from torch.distributed import rpc

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", "from benchmarks.peers import _serve_rpc; _serve_rpc()"]
    server = subprocess.Popen(command, env=os.environ | settings)
    os.environ.update(settings)
    rpc.init_rpc("worker", rank=0, world_size=2)

    def step_of(gradient: np.ndarray) -> Callable[[], object]:
        tensor, parameters = torch.from_numpy(gradient), torch.zeros(gradient.size)
        return lambda: parameters.copy_(rpc.rpc_sync("server", rpc_step, args=(gradient.size, tensor)))

    try:
        yield step_of
    finally:
        rpc.shutdown()
        server.wait()


@contextmanager
def ray_actor() -> Iterator[Callable[[np.ndarray], Callable[[], object]] | None]:
    """A parameter server that is a Ray actor; gives a maker of steps, None where Ray is not installed."""
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

    def step_of(gradient: np.ndarray) -> Callable[[], object]:
        actor = Actor.remote(gradient.size)
        parameters = np.zeros_like(gradient)
        return lambda: np.copyto(parameters, ray.get(actor.step.remote(gradient)))

    try:
        yield step_of
    finally:
        ray.shutdown()
