"""The channel of gRPC that a client's calls are made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from optserve._common import wire
from optserve._rpc.proxies import channel_options
from optserve.config import ClientConfig

RECONNECT_PAUSE_S = 0.1
"""Longest pause between tries while no server is there, of the channel and of a call, so that a client goes on within
0.3 s of a server's return. A try is one small packet to a host that refuses it; all pauses have jitter."""

CONNECT_ATTEMPT_S = 5.0
"""After so long without an answer, as from a host that is down and says nothing, a connection is tried anew: the kernel
by itself would ask again ever more seldom."""


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    """Of a call, as gRPC passes them."""

    method: Any
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class _Metadata(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the same pairs to every call."""

    def __init__(self, pairs: Sequence[tuple[str, str | bytes]]) -> None:
        self._pairs = tuple(pairs)

    def _go_on(self, continuation: Any, details: Any, request: Any) -> Any:
        """Make the call, of whatever shape, with the pairs."""
        metadata = (*(details.metadata or ()), *self._pairs)
        return continuation(
            _Details(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """See _go_on."""
        return self._go_on(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """See _go_on."""
        return self._go_on(continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """See _go_on."""
        return self._go_on(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """See _go_on."""
        return self._go_on(continuation, client_call_details, request_iterator)


def open_channel(target: str, config: ClientConfig) -> grpc.Channel:
    """A connection of its own to a server, secured where there are credentials."""
    options = _options(target, config)
    if config.credentials is None:
        channel = grpc.insecure_channel(target, options)
    else:
        channel = grpc.secure_channel(target, config.credentials, options)
    interceptors = [*([_Metadata(config.metadata)] if config.metadata else []), *config.interceptors]
    return grpc.intercept_channel(channel, *interceptors) if interceptors else channel


def begun(call: Any) -> Any:
    """A stream that has begun, or raise ValueError if its channel was closed.

    With interceptors gRPC gives that error as a stream that has ended at once.
    """
    if isinstance(call, grpc.Future) and call.done() and not call.cancelled():
        error = call.exception()
        if isinstance(error, ValueError):
            raise error
    return call


def _options(target: str, config: ClientConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_receive_bytes + wire.HEADER_BYTES),
        ("grpc.max_send_message_length", config.max_receive_bytes + wire.HEADER_BYTES),
        *wire.http2_options(),
        *channel_options(target),
        ("grpc.keepalive_time_ms", int(1000 * config.keepalive_s)),
        # A connection of its own: clients that share one would share its flow control too.
        ("grpc.use_local_subchannel_pool", 1),
        # gRPC takes no less than 100 ms, and varies it by a fifth.
        ("grpc.initial_reconnect_backoff_ms", int(1000 * RECONNECT_PAUSE_S)),
        ("grpc.max_reconnect_backoff_ms", int(1000 * RECONNECT_PAUSE_S)),
        ("grpc.min_reconnect_backoff_ms", int(1000 * CONNECT_ATTEMPT_S)),
    ]
