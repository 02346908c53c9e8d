"""What attacks on a server need: raw HTTP/2, and another client whose steps and health checks are timed."""

from __future__ import annotations

import contextlib
import importlib
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

import optserve

SERVICE = "/optserve.v1.OptimizerService/"
WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"

# Its types would not let what is wrong through.
H2_CONFIG: Any = importlib.import_module("h2.config")
H2_CONNECTION: Any = importlib.import_module("h2.connection")
H2_SETTINGS: Any = importlib.import_module("h2.settings")
ProtocolError: type[Exception] = importlib.import_module("h2.exceptions").ProtocolError

NO_WINDOW = {H2_SETTINGS.SettingCodes.INITIAL_WINDOW_SIZE: 0}

SIZE = 400_000
"""Elements of the model that the other client trains."""


def framed(message: bytes) -> bytes:
    """A message as gRPC puts it on the wire."""
    return struct.pack(">BI", 0, len(message)) + message


class Raw:
    """A connection that sends what it is told. What comes is read, in a thread, until it is closed.

    Args:
        target: Host and port.
        no_window: Take no byte of any reply.

    Attributes:
        statuses: Of the calls that are over: number of the status, and its words.
    """

    def __init__(self, target: str, *, no_window: bool = False) -> None:
        host, port = target.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self._connection = H2_CONNECTION.H2Connection(
            H2_CONFIG.H2Configuration(client_side=True, header_encoding=None, validate_outbound_headers=False)
        )
        self._lock = threading.RLock()
        self.closed = False
        self.statuses: dict[int, tuple[int, str]] = {}
        with self._lock:
            self._connection.initiate_connection()
            if no_window:
                self._connection.update_settings(NO_WINDOW)
            self._flush()
        threading.Thread(target=self._read, daemon=True).start()

    def _flush(self) -> None:
        self.socket.sendall(self._connection.data_to_send())

    def _read(self) -> None:
        while True:
            try:
                received = self.socket.recv(1 << 16)
                with self._lock:
                    for event in self._connection.receive_data(received):
                        headers = dict(getattr(event, "headers", None) or ())
                        if b"grpc-status" in headers:
                            status = int(headers[b"grpc-status"]), headers.get(b"grpc-message", b"").decode()
                            self.statuses[event.stream_id] = status
                    self._flush()
            except TimeoutError:
                continue
            except (OSError, ProtocolError):
                break
            if not received:
                break
        self.closed = True

    def call(self, path: str, message: bytes | None = None, *, end: bool = False) -> int:
        """Begin a call, with a message if one is given."""
        with self._lock:
            number = self._connection.get_next_available_stream_id()
            headers = [
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path.encode()),
                (b":authority", b"localhost"),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
            ]
            self._connection.send_headers(number, headers)
            if message is not None:
                self._connection.send_data(number, framed(message), end_stream=end)
            self._flush()
            return number

    def send(self, number: int, data: bytes) -> None:
        """Send bytes of a call, as far as the server grants a window for them."""
        with self._lock:
            while data:
                size = min(
                    len(data),
                    self._connection.local_flow_control_window(number),
                    self._connection.max_outbound_frame_size,
                )
                if size <= 0:
                    return
                self._connection.send_data(number, data[:size])
                data = data[size:]
            self._flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@contextlib.contextmanager
def raw(target: str, count: int = 1, *, no_window: bool = False) -> Iterator[list[Raw]]:
    """So many connections."""
    connections: list[Raw] = []
    try:
        connections += [Raw(target, no_window=no_window) for _ in range(count)]
        yield connections
    finally:
        for connection in connections:
            connection.close()


def attempted(calls: Callable[[], object]) -> None:
    """Make an attacker's calls, as far as the server lets them through."""
    with contextlib.suppress(OSError, ProtocolError, grpc.RpcError):
        calls()


@dataclass
class Times:
    """Seconds that steps and health checks took."""

    steps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


class Victim:
    """Another client: it trains, and somebody asks for the server's health, on connections of their own."""

    def __init__(self, target: str) -> None:
        self._client = optserve.connect(target)
        x = {"x": np.zeros(SIZE, np.float32)}
        self._client.create_optimizer("victim", optserve.Sgd(learning_rate=1.0), x)
        self.optimizer = self._client.optimizer("victim", transport="grpc")
        self._gradient = {"x": np.ones(SIZE, np.float32)}
        self._channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.times(0.2)

    def times(self, seconds: float) -> Times:
        """Train and ask for so long."""
        times = Times()
        until = time.monotonic() + seconds

        def ask() -> None:
            while time.monotonic() < until:
                started = time.monotonic()
                self._health.Check(health_pb2.HealthCheckRequest(), timeout=10)
                times.health.append(time.monotonic() - started)
                # The pace of those who ask.
                time.sleep(0.01)

        asking = threading.Thread(target=ask)
        asking.start()
        while time.monotonic() < until:
            started = time.monotonic()
            self.optimizer.step(self._gradient, timeout_s=20)
            times.steps.append(time.monotonic() - started)
        asking.join()
        return times

    def close(self) -> None:
        self.optimizer.close()
        self._client.close()
        self._channel.close()


@contextlib.contextmanager
def victim(target: str) -> Iterator[Victim]:
    made = Victim(target)
    try:
        yield made
    finally:
        made.close()


def assert_unharmed(before: Times, during: Times) -> None:
    """Steps take at most three times as long as just before, and health checks at most a quarter of a second.

    Of the times the median and the ninth decile: somebody else may compute on this machine for a moment.
    """
    calm, attacked = statistics.median(before.steps), statistics.median(during.steps)
    assert attacked <= 3 * calm + 0.002, f"{1000 * calm:.1f} ms became {1000 * attacked:.1f} ms"
    slow = statistics.quantiles(during.health, n=10)[-1]
    assert slow <= 0.25, f"health took {1000 * slow:.0f} ms"


@dataclass
class Used:
    """What a process holds."""

    threads: int
    descriptors: int
    rss_bytes: int


def used(server: optserve.LocalServer) -> Used:
    process = psutil.Process(server.process.pid)
    with process.oneshot():
        return Used(process.num_threads(), process.num_fds(), process.memory_info().rss)


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Look again and again: for what happens in another process, which tells nobody."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)
