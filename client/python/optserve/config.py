"""The client's settings, and what it reads of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import grpc

    Interceptor = (
        grpc.UnaryUnaryClientInterceptor
        | grpc.UnaryStreamClientInterceptor
        | grpc.StreamUnaryClientInterceptor
        | grpc.StreamStreamClientInterceptor
    )

_METADATA_KEY = re.compile(r"(?!grpc-)[0-9a-z_.-]+")
_METADATA_TEXT = re.compile(r"[ -~]*")


@dataclass(frozen=True)
class ClientConfig:
    """How a client talks to its server. All times are finite, so nothing hangs for ever."""

    connect_timeout_s: float = 10.0
    """How long `connect` waits for the server's first answer."""
    timeout_s: float = 30.0
    """How long any other call may take, retries included."""
    step_timeout_s: float = 300.0
    """How long a step, a checkpoint, a restore, an export or an import may take, reconnections included."""
    initial_backoff_s: float = 0.05
    """Pause before the first retry; it doubles with each."""
    max_backoff_s: float = 2.0
    """Longest pause between retries; while no server is there, it is a tenth of a second at most."""
    transport: Literal["auto", "grpc", "shm"] = "auto"
    """How tensors travel where `Client.optimizer` does not say: `auto` shares memory with a server on the same host."""
    max_chunk_bytes: int = 0
    """Largest payload of one message, either way; 0 for the server's preference. Its limit holds as well."""
    max_receive_bytes: int = 64 << 20
    """Largest payload of a message that is accepted from the server, or sent to it."""
    keep_freed_memory: bool = True
    """Tell glibc's allocator, for the whole process, to keep up to 16 MiB of freed memory per arena instead of
    returning it after every message. Large steps over gRPC take a quarter less time."""
    keepalive_s: float = 60.0
    """Seconds after which a silent connection with a call on it is probed. Servers close connections that are probed
    too often."""
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    """What secures the connection, such as `grpc.ssl_channel_credentials(…)`; None for one that is not secured."""
    metadata: Sequence[tuple[str, str | bytes]] = field(default=(), repr=False)
    """Pairs that are sent with every call. Keys are of a-z, 0-9, '_', '.' and '-'; the values of those that end in
    `-bin` are bytes, others printable ASCII. They are no secret on a connection that is not secured."""
    interceptors: Sequence[Interceptor] = field(default=(), repr=False)
    """gRPC's client interceptors, which see every call, the first one first, after `metadata` was added."""

    def __post_init__(self) -> None:
        """Check every value, or raise ValueError."""
        for name in ("connect_timeout_s", "timeout_s", "step_timeout_s", "initial_backoff_s", "max_backoff_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds, not {getattr(self, name)!r}.")
        if self.transport not in ("auto", "grpc", "shm"):
            raise ValueError(f"transport must be auto, grpc or shm, not {self.transport!r}.")
        if self.max_receive_bytes < 8 << 20:
            raise ValueError("max_receive_bytes must be at least 8 MiB, which any server may send.")
        if self.keepalive_s < 60:
            raise ValueError(f"keepalive_s must be at least 60, not {self.keepalive_s!r}: servers refuse more.")
        if self.max_chunk_bytes and not 1024 <= self.max_chunk_bytes <= self.max_receive_bytes:
            raise ValueError(f"max_chunk_bytes must be 0 or 1024 to {self.max_receive_bytes}.")
        object.__setattr__(self, "metadata", tuple((key, value) for key, value in self.metadata))
        object.__setattr__(self, "interceptors", tuple(self.interceptors))
        for key, value in self.metadata:
            _check_metadata(key, value)


def _check_metadata(key: str, value: str | bytes) -> None:
    """Raise ValueError for a pair that gRPC does not send.

    The value may be a secret, so it is not shown; nor is a key that cannot be one, as the two may be swapped.
    """
    if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
        raise ValueError(
            "A key of metadata has a-z, 0-9, '_', '.' and '-' only, and is not gRPC's own; a pair is (key, value), in "
            "this order."
        )
    if key.endswith("-bin"):
        if not isinstance(value, bytes):
            raise ValueError(f"The metadata {key} must be bytes.")
    elif not isinstance(value, str) or not _METADATA_TEXT.fullmatch(value):
        raise ValueError(f"The metadata {key} must be a text of printable ASCII characters.")


def proxy_variable() -> str:
    """Name of the environment variable that gRPC takes its proxy from; empty where it takes none."""
    return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), "")


def no_proxy_hosts() -> list[str]:
    """Names, suffixes and networks that gRPC reaches without the proxy."""
    listed = next((listed for name in ("no_grpc_proxy", "no_proxy") if (listed := os.environ.get(name))), "")
    return [entry for item in listed.split(",") if (entry := item.strip())]
