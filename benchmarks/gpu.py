"""The CuPy backend on a GPU beside the device's own copies and torch's optimizers there; `make gpu` runs it.

Prints a table of ratios, with the bar that each is held to, and writes it as JSON.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch

import optserve
from optserve_server.numerics.backends import load
from optserve_server.numerics.backends.base import Stretch
from optserve_server.numerics.backends.cupy import CupyBackend
from optserve_server.numerics.backends.device_steps import Arenas
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import Adadelta, AdamW, Rule
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.state import State

LARGE = 256_000_000
F4 = np.dtype("<f4")


@dataclass(frozen=True)
class Row:
    """A measured ratio.

    Attributes:
        name: What was measured, and over what.
        value: The ratio.
        bar: What it is held to; empty without a bar.
        detail: The times or rates behind it.
    """

    name: str
    value: float
    bar: str = ""
    detail: str = ""

    @property
    def text(self) -> str:
        return f"{self.name:70} {self.value:8.3f}  {self.bar:8} {self.detail}"


def seconds(call: Callable[[], object], rounds: int = 11) -> float:
    """The median time of a call, until the device is done."""
    taken: list[float] = []
    for turn in range(rounds + 2):
        start = time.perf_counter()
        call()
        cupy.cuda.Device().synchronize()
        # The first turns warm up.
        if turn > 1:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def bare_kernel(backend: CupyBackend, rule: Rule, gradient: Any) -> float:
    """Seconds of the kernel alone, with the gradient on the device."""
    program = backend.program(type(rule), F4, hosted=False)
    slots = [backend.zeros(gradient.size, F4) for _ in rule.slots]
    arenas = Arenas([gradient.data.ptr], [slot.data.ptr for slot in slots], [])
    whole = [Stretch(slice(0, gradient.size), rule.constants(F4, 1), None)]
    stream = cupy.cuda.Stream(non_blocking=True)

    def step() -> None:
        backend.steps.launch(program, arenas, whole, stream)
        stream.synchronize()

    return seconds(step)


def torch_step(gradient: Any, make: Callable[[Any], torch.optim.Optimizer]) -> float:
    """Seconds of a step of torch's optimizer on the device."""
    parameter = torch.zeros(gradient.size, device="cuda")
    parameter.grad = torch.from_dlpack(gradient)
    return seconds(make(parameter).step, 7)


def copy_rate(gradient: Any) -> float:
    """Bytes that a copy on the device reads and writes in a second."""
    target = cupy.empty_like(gradient)
    return 2 * gradient.nbytes / seconds(lambda: cupy.copyto(target, gradient))


def kernels(backend: CupyBackend) -> Iterator[Row]:
    """Kernels on arrays that are on the device."""
    gradient = cupy.full(LARGE, 0.5, F4)
    rate = copy_rate(gradient)
    cupy.get_default_memory_pool().free_all_blocks()
    peers: dict[str, tuple[Rule, str, Callable[[Any], torch.optim.Optimizer], str]] = {
        "ADADELTA": (
            Adadelta(),
            "torch.optim.Adadelta(foreach=True)",
            lambda x: torch.optim.Adadelta([x], lr=1.0, rho=0.95, eps=1e-6, foreach=True),
            ">= 3",
        ),
        "AdamW": (AdamW(), "torch.optim.AdamW(fused=True)", lambda x: torch.optim.AdamW([x], fused=True), ">= 1"),
    }
    for name, (rule, peer, make, bar) in peers.items():
        taken = bare_kernel(backend, rule, gradient)
        moved = 2 * (1 + len(rule.slots)) * gradient.nbytes
        detail = f"{1e3 * taken:.2f} ms, copy {rate / 1e12:.2f} TB/s"
        yield Row(f"{name}, 256 M float32: bytes moved / time, over a copy's", moved / taken / rate, ">= 0.85", detail)
        cupy.get_default_memory_pool().free_all_blocks()
        theirs = torch_step(gradient, make)
        torch.cuda.empty_cache()
        yield Row(f"{peer}, 256 M / kernel", theirs / taken, bar, f"{1e3 * theirs:.2f} ms")


def state_step(backend: CupyBackend, sizes: list[int], *, grouped: bool = False) -> Callable[[], None]:
    """A step of a whole state, from pinned memory to pinned memory."""
    layout = Layout(tuple(Parameter(f"p{number}", (size,), F4) for number, size in enumerate(sizes)))
    groups = (Group(tuple(range(0, len(sizes), 2)), {"learning_rate": 0.5}),) if grouped else ()
    state = State(layout, Settings(Adadelta(), groups=groups), backend)
    arenas, payload = layout.arenas(backend.staging(layout.size_bytes)), Payload(layout, ALL)
    arenas[F4][:] = 0.5
    steps = iter(range(1 << 30))
    return lambda: state.apply({Operand.GRADIENT: arenas}, payload.runs, next(steps))


def steps(backend: CupyBackend) -> Iterator[Row]:
    """Steps from pinned memory to pinned memory."""
    one = seconds(state_step(backend, [10_000_000]), 21)
    for name, grouped, bar in (
        ("1,000 tensors of 10 K", False, "<= 1.3"),
        ("the same, every second in another group", True, ""),
    ):
        many = seconds(state_step(backend, [10_000] * 1000, grouped=grouped), 21)
        yield Row(f"{name} / one of 10 M", many / one, bar, f"{1e3 * many:.2f} ms")
    for size in (256, 545_810, 16_000_000, 64_000_000):
        taken, alone = seconds(state_step(backend, [size]), 51), copies(4 * size)
        detail = f"{1e6 * taken:.0f} us"
        yield Row(f"step of {size:,} / pinned copies in and out, overlapped", taken / alone, "", detail)


def copies(size_bytes: int) -> float:
    """Seconds of a copy to the device and one from it, at the same time, from and to pinned memory."""
    hosts = [cupy.cuda.alloc_pinned_memory(size_bytes) for _ in range(2)]
    given, taken = (np.frombuffer(host, np.uint8, size_bytes) for host in hosts)
    arrays = [cupy.empty(size_bytes, np.uint8) for _ in range(2)]
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))

    def both() -> None:
        arrays[0].set(given, stream=first)
        arrays[1].get(out=taken, stream=second, blocking=False)
        first.synchronize()
        second.synchronize()

    return seconds(both, 21)


@contextmanager
def shared_optimizer(backend: str, size: int) -> Iterator[Callable[[], object]]:
    """A step in the memory that a client shares with a server."""
    with optserve.local_server(backend=backend) as server, optserve.connect(server.target) as client:
        client.create_optimizer("x", optserve.Adadelta(), {"x": np.zeros(size, F4)})
        opt = client.optimizer("x", transport="shm")
        arrays = opt.buffers()
        arrays["x"][:] = 0.5
        yield lambda: opt.step(arrays, out=arrays)
        opt.close()


def through_a_server() -> Iterator[Row]:
    """Steps in shared memory, with a server process."""
    for size, bar in ((256, ""), (64_000_000, "<= 1.3")):
        taken: dict[str, float] = {}
        for name in ("cupy", "numba"):
            with shared_optimizer(name, size) as step:
                taken[name] = seconds(step, 7 if size > 1_000_000 else 101)
        detail = f"{1e3 * taken['cupy']:.2f} ms; on the CPU {1e3 * taken['numba']:.2f} ms"
        alone = copies(4 * size)
        yield Row(f"step of {size:,} over shared memory / pinned copies alone", taken["cupy"] / alone, bar, detail)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backend = load("cupy")
    if not isinstance(backend, CupyBackend):
        raise TypeError(f"cupy is {backend}.")
    rows: list[Row] = []
    for part in (kernels(backend), steps(backend), through_a_server()):
        for row in part:
            rows.append(row)
            print(row.text, flush=True)
        cupy.get_default_memory_pool().free_all_blocks()
    if options.json:
        found = {
            "device": backend.device,
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {module.__name__: module.__version__ for module in (cupy, np, torch)},
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
