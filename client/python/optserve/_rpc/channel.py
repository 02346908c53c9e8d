"""The channel of gRPC that a client's calls are made on."""

from __future__ import annotations

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


def open_channel(target: str, config: ClientConfig) -> grpc.Channel:
    """A connection of its own to a server."""
    return grpc.insecure_channel(
        target,
        options=[
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
        ],
    )
