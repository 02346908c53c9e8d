"""One ADADELTA step through a server on this host, beside a raw gRPC echo of the same bytes and other servers."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np

import optserve
from benchmarks import kernels, peers
from benchmarks.measure import Candidate, Timing, interleaved

MESSAGE_BYTES = 1 << 20
PEER = "raw gRPC echo"


def _echo_server() -> None:
    """A gRPC server that sends every message back; run as a process of its own."""
    from concurrent.futures import ThreadPoolExecutor

    def echo(requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from requests

    server = grpc.server(ThreadPoolExecutor(4))
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0)


@contextmanager
def _echo(size_bytes: int) -> Iterator[Callable[[], None]]:
    """A call that sends and receives `size_bytes` over an open stream, without a copy into or out of arrays."""
    command = [sys.executable, "-c", "from benchmarks.service import _echo_server; _echo_server()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if process.stdout is None or process.stdin is None:
        raise RuntimeError("the echo server has no pipes")
    port = int(process.stdout.readline())
    messages = [bytes(min(MESSAGE_BYTES, size_bytes - begin)) for begin in range(0, size_bytes, MESSAGE_BYTES)]
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = iter(channel.stream_stream("/bench/Echo", None, None)(iter(outgoing.get, None)))

        def echo() -> None:
            for message in messages:
                outgoing.put(message)
            for _ in messages:
                next(call)

        yield echo
        outgoing.put(None)
    process.stdin.close()
    process.wait()
    process.stdout.close()


STREAM, HALVES, SHARED, COPIED = (
    "optserve, gRPC float32",
    "optserve, gRPC bfloat16",
    "optserve, shared memory",
    "optserve, shared memory, copied in and out",
)
TORCH, KERNEL, COPY = "torch.optim.Adadelta, local", "our kernel, in process", "memcpy, there and back"
RPC, RAY = "torch.distributed.rpc parameter server", "Ray actor parameter server"


def measure(size: int, rounds: int) -> dict[str, Timing]:
    """Timings by name for `size` float32 parameters."""
    gradient = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    given, out, target = {"x": gradient}, {"x": np.empty(size, np.float32)}, np.empty((2, size), np.float32)
    with optserve.local_server() as server, optserve.connect(server.target) as client, _echo(4 * size) as echo:

        def optimizer(name: str, **options: Any) -> optserve.Optimizer:
            client.create_optimizer(name, optserve.Adadelta(), given)
            return client.optimizer(name, **options)

        stream = optimizer("stream", transport="grpc")
        halves = optimizer("halves", wire_dtype="bfloat16")
        shared, copied = optimizer("shared", transport="shm"), optimizer("copied", transport="shm")

        def in_place() -> None:
            arrays = shared.buffers()
            shared.step(arrays, out=arrays)

        return interleaved(
            {
                PEER: Candidate(echo),
                STREAM: Candidate(lambda: stream.step(given, out=out)),
                HALVES: Candidate(lambda: halves.step(given, out=out)),
                # The gradient is made where the server finds it; the update is left there too.
                SHARED: Candidate(in_place, lambda: np.copyto(shared.buffers()["x"], gradient)),
                COPIED: Candidate(lambda: copied.step(given, out=out)),
                KERNEL: kernels.backend_step("numba", gradient),
                TORCH: kernels.torch_step(gradient),
                COPY: Candidate(lambda: (np.copyto(target[0], gradient), np.copyto(target[1], target[0]))),
            },
            rounds,
        )


def beside(peer: str, size: int, rounds: int) -> dict[str, Timing]:
    """Our step through a stream beside another parameter server, which runs for no longer than that.

    Its background processes would disturb everything else.
    """
    gradient = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    given, out = {"x": gradient}, {"x": np.empty(size, np.float32)}
    with (
        {RPC: peers.torch_rpc, RAY: peers.ray_actor}[peer](size) as other,
        optserve.local_server() as server,
        optserve.connect(server.target) as client,
    ):
        client.create_optimizer("bench", optserve.Adadelta(), given)
        client.create_optimizer("shared", optserve.Adadelta(), given)
        ours, shared = client.optimizer("bench", transport="grpc"), client.optimizer("shared", transport="shm")
        pause = other.pause if other else lambda: None
        candidates = {
            STREAM: Candidate(lambda: ours.step(given, out=out), pause),
            # On one host Ray and torch take memory that is shared, too.
            COPIED: Candidate(lambda: shared.step(given, out=out), pause),
        }
        if other is not None:
            candidates[peer] = Candidate(other.step, other.resume)
        return interleaved(candidates, rounds)


SPEECH_NET = {
    f"{kind}{layer}": shape
    for layer, (fan_in, fan_out) in enumerate(
        ((1_040, 2_560), (2_560, 2_560), (2_560, 2_560), (2_560, 2_560), (2_560, 8_000)), 1
    )
    for kind, shape in (("w", (fan_in, fan_out)), ("b", (fan_out,)))
}
"""The paper's section 4.4: 42.8 million weights."""


def speech(_size: int, rounds: int) -> dict[str, Timing]:
    """A step of an asynchronous worker on the speech network through each transport, new parameters as the reply."""
    gradient, out = (
        {name: np.full(shape, value, np.float32) for name, shape in SPEECH_NET.items()} for value in (1e-3, 0)
    )
    flat = np.concatenate([array.ravel() for array in gradient.values()])
    with optserve.local_server() as server, optserve.connect(server.target) as client, ExitStack() as stack:

        def worker(name: str, **options: Any) -> Callable[[], object]:
            client.create_optimizer(name, optserve.Adadelta(), out, hosted=True, consistency=optserve.Async())
            joined = stack.enter_context(client.worker(name, "w", **options))
            joined.pull(out=out)
            return lambda: joined.step(gradient, out=out)

        return interleaved(
            {
                STREAM: Candidate(worker("stream", transport="grpc")),
                HALVES: Candidate(worker("halves", wire_dtype="bfloat16")),
                SHARED: Candidate(worker("shared", transport="shm")),
                KERNEL: kernels.backend_step("numba", flat),
                TORCH: kernels.torch_step(flat),
            },
            rounds,
        )
