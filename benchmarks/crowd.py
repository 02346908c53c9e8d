"""Many workers on one model: what is done altogether, who is served how often, and whether the server still answers."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

import optserve

MNIST_NET = {"w1": (784, 500), "b1": (500,), "w2": (500, 300), "b2": (300,), "w3": (300, 10), "b3": (10,)}
FEW, MANY = 8, 200
STEPS = 20_000
PROCESSES = 4
"""Of clients, so that the interpreter of one of them does not bound what the server can do."""

HEALTH_EVERY_S = 0.03


def _arrays(shapes: dict[str, tuple[int, ...]], value: float = 0.0) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Crowd:
    """What was seen while workers stepped as fast as they could.

    Attributes:
        workers: How many, each with a stream of its own.
        steps: Of all of them.
        per_s: Steps of all of them in a second.
        slowest: Steps of the slowest worker, relative to the mean.
        health_p99_s: Of a health check from a process of its own, the 99th percentile; its median is `health_s`.
        early_bytes: Resident memory of the server, the median of the first third of the run after a warm-up.
        late_bytes: Of the last third.
    """

    workers: int
    steps: int
    per_s: float
    slowest: float
    health_s: float
    health_p99_s: float
    early_bytes: float
    late_bytes: float


@dataclass(frozen=True)
class Crowds:
    """A few workers beside many."""

    title: str
    few: Crowd
    many: Crowd

    def show(self, console: Console) -> None:
        """Print a table."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("")
        for crowd in (self.few, self.many):
            table.add_column(f"{crowd.workers} workers", justify="right")
        rows: dict[str, Callable[[Crowd], str]] = {
            "steps": lambda crowd: f"{crowd.steps:,}",
            "steps / s": lambda crowd: f"{crowd.per_s:.0f}",
            "slowest / mean": lambda crowd: f"{crowd.slowest:.2f}",
            "health check, ms": lambda crowd: f"{1e3 * crowd.health_s:.1f}",
            "health check, p99, ms": lambda crowd: f"{1e3 * crowd.health_p99_s:.1f}",
            "server, first third, MB": lambda crowd: f"{crowd.early_bytes / 1e6:.0f}",
            "server, last third, MB": lambda crowd: f"{crowd.late_bytes / 1e6:.0f}",
        }
        for name, show in rows.items():
            table.add_row(name, show(self.few), show(self.many))
        console.print(table)

    def results(self) -> Iterator[tuple[str, str, float, float]]:
        """(what, over what, at most, measured) of every bar."""
        yield f"step of {FEW} workers", f"of {MANY}: throughput", 1 / 0.8, self.few.per_s / self.many.per_s
        yield "mean worker's steps", "slowest's", 2.0, 1 / self.many.slowest
        yield "health check, p99", "100 ms", 1.0, self.many.health_p99_s / 0.1
        yield "memory, last third", "first third", 1.1, self.many.late_bytes / self.many.early_bytes

    def as_json(self) -> dict[str, object]:
        """As it is written down."""
        bars = [
            {"name": name, "over": over, "at_most": most, "ratio": ratio} for name, over, most, ratio in self.results()
        ]
        return {"title": self.title, "few": asdict(self.few), "many": asdict(self.many), "bars": bars}


def crowds(transport: str) -> Crowds:
    """Step the MNIST network with a few workers, and then with many, over `auto` or `grpc`."""
    with optserve.local_server() as server:
        few = _crowd(server, FEW, STEPS // 4, transport)
        many = _crowd(server, MANY, STEPS, transport)
    how = "gRPC" if transport == "grpc" else "as they come by themselves, sharing memory"
    return Crowds(f"{MANY} workers' streams beside {FEW}, MNIST network, {how}", few, many)


def _crowd(server: optserve.LocalServer, workers: int, steps: int, transport: str) -> Crowd:
    name = f"crowd-{workers}"
    with optserve.connect(server.target) as client, ExitStack() as stack:
        start = _arrays(MNIST_NET)
        client.create_optimizer(name, optserve.Adadelta(), start, hosted=True, consistency=optserve.Async())
        share = workers // PROCESSES
        processes = [
            stack.enter_context(_process("_run_workers", server.target, name, share, transport))
            for _ in range(PROCESSES)
        ]
        for process in processes:
            # Every one of them has made a step.
            process.stdout.readline()
        for process in processes:
            process.stdin.write("go\n")
        memory, resident = psutil.Process(server.process.pid), []
        with _process("_check_health", server.target) as health:
            health.stdout.readline()
            before, begun = client.optimizer(name).current_step, time.monotonic()
            while (made := client.optimizer(name).current_step - before) < steps:
                resident.append(memory.memory_info().rss)
                time.sleep(0.25)
            seconds = time.monotonic() - begun
            checks = [float(value) for value in _answer(health).split()]
        counts = [int(value) for process in processes for value in _answer(process).split()]
    third = len(resident) // 3
    return Crowd(
        workers,
        made,
        made / seconds,
        min(counts) / statistics.mean(counts),
        statistics.median(checks),
        statistics.quantiles(checks, n=100)[98],
        statistics.median(resident[third // 2 : third]),
        statistics.median(resident[-third:]),
    )


@contextmanager
def _process(function: str, *arguments: object) -> Iterator[Any]:
    code = f"from benchmarks import crowd; crowd.{function}(*{arguments!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(process: Any) -> str:
    """End a process's work, and take what it says."""
    process.stdin.write("stop\n")
    return process.stdout.readline()


def _run_workers(target: str, name: str, count: int, transport: Any) -> None:
    """Step with some workers until told to stop; prints how many steps each has made since told to go."""
    made, stop = [0] * count, threading.Event()
    ready = threading.Barrier(count + 1)
    go = threading.Event()
    with optserve.connect(target) as one, optserve.connect(target) as other:

        def run(number: int) -> None:
            out, gradient = _arrays(MNIST_NET), _arrays(MNIST_NET, 1e-3)
            with (one, other)[number % 2].worker(name, f"w{os.getpid()}-{number}", transport=transport) as worker:
                worker.pull(out=out)
                worker.step(gradient, out=out)
                ready.wait()
                go.wait()
                while not stop.is_set():
                    worker.step(gradient, out=out)
                    made[number] += 1

        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        print("ready", flush=True)
        sys.stdin.readline()
        go.set()
        sys.stdin.readline()
        counted = list(made)
        stop.set()
        for thread in threads:
            thread.join()
    print(*counted, flush=True)


def _check_health(target: str) -> None:
    """Check again and again until told to stop; prints the seconds of each check."""
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), done.set()), daemon=True).start()
    taken = []
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        print("ready", flush=True)
        while not done.wait(HEALTH_EVERY_S):
            start = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            taken.append(time.perf_counter() - start)
    print(*taken, flush=True)
