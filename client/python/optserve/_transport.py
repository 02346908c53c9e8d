"""The channel: deadlines, retries and errors of every call. What is called is none of its business."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from optserve import wire
from optserve._watchdog import Watchdog
from optserve.config import ClientConfig
from optserve.errors import ClientUseError, DeadlineExceededError, OptserveError, UnavailableError, from_rpc_error
from optserve.v1 import service_pb2, service_pb2_grpc

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].full_name

_Response = TypeVar("_Response")


class Backoff:
    """Pauses between tries: doubling, with jitter, never beyond the deadline."""

    def __init__(self, config: ClientConfig, deadline: float) -> None:
        self._deadline = deadline
        self._pause_s = config.initial_backoff_s
        self._max_pause_s = config.max_backoff_s

    def pause(self, error: OptserveError, closed: threading.Event) -> None:
        """Wait before another try, or raise `error` if no time is left or `closed` is set."""
        pause_s = error.retry_after_s or self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        self._pause_s = min(2 * self._pause_s, self._max_pause_s)
        if time.monotonic() + pause_s >= self._deadline or closed.wait(pause_s):
            raise error


class Transport:
    """One connection to one server."""

    def __init__(self, target: str, config: ClientConfig) -> None:
        self.target = target
        self.config = config
        self.watchdog = Watchdog()
        self.closed = threading.Event()
        self._pid = os.getpid()
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", config.max_receive_bytes),
                ("grpc.max_send_message_length", config.max_receive_bytes),
                ("grpc.keepalive_time_ms", int(1000 * config.keepalive_s)),
                # A connection of its own: clients that share one would share its flow control too.
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", int(1000 * config.initial_backoff_s)),
                ("grpc.max_reconnect_backoff_ms", int(1000 * config.max_backoff_s)),
            ],
        )
        self.stub = service_pb2_grpc.OptimizerServiceStub(self._channel)
        self._stream_steps = self._channel.stream_stream(f"/{_SERVICE}/StreamSteps", wire.encode, wire.decode_response)

    def call(
        self, method: Callable[..., _Response], request: Any, *, timeout_s: float | None = None, idempotent: bool = True
    ) -> _Response:
        """Make a unary call; try it again while the server is unavailable, if that is harmless.

        Raises:
            OptserveError: The server's answer, or that it gave none.
        """
        self.check_usable()
        timeout_s = timeout_s or self.config.timeout_s
        deadline = time.monotonic() + timeout_s
        backoff = Backoff(self.config, deadline)
        while True:
            try:
                return method(request, timeout=max(deadline - time.monotonic(), 0.001))
            except grpc.RpcError as rpc_error:
                error = self.translate(rpc_error, timeout_s)
            if not idempotent or not (isinstance(error, UnavailableError) or error.retry_after_s):
                raise error
            backoff.pause(error, self.closed)

    def stream_steps(self, frames: Iterator[wire.RequestFrame]) -> Any:
        """Start a StreamSteps call. It has no deadline of its own; the watchdog cancels it."""
        self.check_usable()
        return self._stream_steps(frames)

    def translate(self, error: grpc.RpcError, timeout_s: float) -> OptserveError:
        """The exception for a failed call."""
        translated = from_rpc_error(error, self.target)
        if isinstance(translated, DeadlineExceededError) and not translated.reason:
            return DeadlineExceededError(f"{self.target} did not answer within {timeout_s:g} s.")
        return translated

    def check_usable(self) -> None:
        """Raise ClientUseError if the client is closed or was inherited by fork."""
        if self.closed.is_set():
            raise ClientUseError("This client is closed.")
        if os.getpid() != self._pid:
            raise ClientUseError(
                "This client was made before the process forked, and gRPC connections do not survive that. "
                "Connect again in the new process, or start it with the 'spawn' method."
            )

    def close(self) -> None:
        """Close the connection. May be called more than once."""
        self.closed.set()
        self.watchdog.close()
        if os.getpid() == self._pid:
            self._channel.close()
