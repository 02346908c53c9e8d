"""Opens the gRPC channel for a client's calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from optserve._common import wire
from optserve._common.clock import Clock
from optserve._rpc.proxies import channel_options
from optserve._rpc.tls_channel import TlsChannel
from optserve.config import ClientConfig, has_fork_handlers
from optserve.errors import ClientUseError

RECONNECT_PAUSE_S = 0.1
"""Longest pause between tries while no server answers, for the channel and for a call. So a client goes on within 0.3 s
after the server is back. A try is one small packet to a host that refuses it; all pauses have jitter."""

CONNECT_ATTEMPT_S = 5.0
"""Seconds without an answer, as from a host that is down, after which the channel begins a new connection. The kernel
by itself would try again after longer and longer pauses."""


INHERITED = (
    "This process was forked from one with a client, and gRPC does not survive that. Start it with the 'spawn' method, "
    "as by multiprocessing.get_context('spawn'), and connect there."
)
"""The error of a client, or of a new connection, in a process that has inherited gRPC by a fork."""

_processes: set[int] = set()
"""The processes that have opened channels: this one, and one from which it was forked."""

STATE_KNOWN_S = 0.05
"""Seconds in which a channel says that it is connected."""


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    """Details of a call, in the form that gRPC passes to interceptors."""

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
    """Adds the same metadata to every call."""

    def __init__(self, pairs: Sequence[tuple[str, str | bytes]]) -> None:
        self._pairs = tuple(pairs)

    def _go_on(self, continuation: Any, details: Any, request: Any) -> Any:
        """Make a call of any kind with the metadata."""
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


def open_channel(target: str, config: ClientConfig, clock: Clock) -> grpc.Channel:
    """Open a channel with a connection of its own. With `tls` or credentials the connection is secured.

    Raises:
        InvalidArgumentError: See `TlsChannel`.
        ClientUseError: This process was forked from one that had channels; gRPC would wait there for ever.
    """
    _check_not_forked()
    options = _options(target, config)
    if config.tls is not None:
        channel = TlsChannel(config.tls, lambda credentials: grpc.secure_channel(target, credentials, options), clock)
    elif config.credentials is not None:
        channel = grpc.secure_channel(target, config.credentials, options)
    else:
        channel = grpc.insecure_channel(target, options)
    interceptors = [*([_Metadata(config.metadata)] if config.metadata else []), *config.interceptors]
    return grpc.intercept_channel(channel, *interceptors) if interceptors else channel


def _check_not_forked() -> None:
    _processes.add(os.getpid())
    if len(_processes) > 1 and not has_fork_handlers():
        raise ClientUseError(INHERITED)


def is_connected(channel: grpc.Channel) -> bool:
    """Whether a channel has a connection to a server now."""
    ready = grpc.channel_ready_future(channel)
    try:
        ready.result(STATE_KNOWN_S)
    except grpc.FutureTimeoutError:
        return False
    finally:
        ready.cancel()
    return True


def begun(call: Any) -> Any:
    """The call of a stream; raises ValueError if its channel was closed.

    With interceptors gRPC does not raise this error, but returns a stream that has already ended.
    """
    if isinstance(call, grpc.Future) and call.done() and not call.cancelled():
        error = call.exception()
        if isinstance(error, ValueError):
            raise error
    return call


def _options(target: str, config: ClientConfig) -> list[tuple[str, int | str]]:
    server_name = config.tls.server_name if config.tls else ""
    return [
        *([("grpc.ssl_target_name_override", server_name)] if server_name else []),
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
