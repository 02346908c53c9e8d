"""One ADADELTA step through a server on this host, beside a raw gRPC echo of the same bytes."""

from __future__ import annotations

import queue
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import torch

import optserve
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


def measure(size: int, rounds: int) -> dict[str, Timing]:
    """Timings by name for `size` float32 parameters."""
    gradient = {"x": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    out = {"x": np.empty(size, np.float32)}
    parameter = torch.nn.Parameter(torch.zeros(size))
    parameter.grad = torch.from_numpy(gradient["x"].copy())
    local = torch.optim.Adadelta([parameter], lr=1.0, rho=0.95, eps=1e-6)
    with optserve.local_server() as server, optserve.connect(server.target) as client, _echo(4 * size) as echo:
        optimizer = client.create_optimizer(f"bench-{uuid.uuid4().hex[:8]}", optserve.Adadelta(), gradient)
        client.create_optimizer("bench-halves", optserve.Adadelta(), gradient)
        halves = client.optimizer("bench-halves", wire_dtype="bfloat16")
        return interleaved(
            {
                PEER: Candidate(echo),
                "optserve, gRPC float32": Candidate(lambda: optimizer.step(gradient, out=out)),
                "optserve, gRPC bfloat16": Candidate(lambda: halves.step(gradient, out=out)),
                "torch.optim.Adadelta, local": Candidate(local.step),
            },
            rounds,
        )
