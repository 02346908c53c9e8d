"""Makes steps through a server of its own tree when it is told to; see `revisions`.

It uses what every revision offers to users, and nothing else, because it runs with the code of another one as well.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import optserve

MNIST, LARGE = 545_810, 16_000_000


@dataclass(frozen=True)
class Case:
    """Steps of one kind.

    Attributes:
        size: float32 parameters.
        batch: Steps at a time.
        options: Of the client's handle.
        in_place: Whether the gradient is made in shared memory.
        worker: Whether it is an asynchronous worker of a hosted optimizer.
        durable: Whether steps are written to a journal.
    """

    size: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False
    worker: bool = False
    durable: bool = False


SHM, GRPC, HALVES = {"transport": "shm"}, {"transport": "grpc"}, {"wire_dtype": "bfloat16"}
CASES = {
    "256, shared memory, in place": Case(256, 50, SHM, in_place=True),
    "256, shared memory": Case(256, 50, SHM),
    "256, gRPC": Case(256, 50, GRPC),
    "256, gRPC, journal": Case(256, 20, GRPC, durable=True),
    "545,810, shared memory, in place": Case(MNIST, 20, SHM, in_place=True),
    "545,810, shared memory, copied": Case(MNIST, 20, SHM),
    "545,810, gRPC": Case(MNIST, 10, GRPC),
    "545,810, gRPC, bfloat16": Case(MNIST, 10, HALVES),
    "545,810, shared memory, worker": Case(MNIST, 10, SHM, worker=True),
    "16,000,000, shared memory, in place": Case(LARGE, 2, SHM, in_place=True),
    "16,000,000, gRPC": Case(LARGE, 1, GRPC),
    "16,000,000, gRPC, bfloat16": Case(LARGE, 1, HALVES),
}


def _step(case: Case, client: optserve.Client, name: str, stack: ExitStack) -> Callable[[], object]:
    gradient = {"x": np.random.default_rng(0).standard_normal(case.size).astype(np.float32)}
    out = {"x": np.zeros(case.size, np.float32)}
    if case.worker:
        client.create_optimizer(name, optserve.Adadelta(), out, hosted=True, consistency=optserve.Async())
        worker = stack.enter_context(client.worker(name, "w", **case.options))
        worker.pull(out=out)
        return lambda: worker.step(gradient, out=out)
    client.create_optimizer(name, optserve.Adadelta(), gradient)
    optimizer = client.optimizer(name, **case.options)
    if not case.in_place:
        return lambda: optimizer.step(gradient, out=out)

    def in_place() -> None:
        arrays = optimizer.buffers()
        np.copyto(arrays["x"], gradient["x"])
        optimizer.step(arrays, out=arrays)

    return in_place


def main(root: str) -> None:
    """Read a case and a number of steps per line, answer with the seconds that each took."""
    for package in ("optserve", "optserve_server"):
        spec = importlib.util.find_spec(package)
        if spec is None or not str(spec.origin).startswith(root):
            raise RuntimeError(f"{package} is not that of {root}: {spec and spec.origin}")
    steps: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="optserve-bench-"))
        clients = {
            durable: stack.enter_context(
                optserve.connect(stack.enter_context(optserve.local_server(folder if durable else None)).target)
            )
            for durable in (False, True)
        }
        for line in sys.stdin:
            name, count = json.loads(line)
            if name not in steps:
                case = CASES[name]
                steps[name] = _step(case, clients[case.durable], f"case-{len(steps)}", stack)
            step, seconds = steps[name], []
            for _ in range(count):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
