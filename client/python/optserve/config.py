"""The client's settings, and the environment variables that it reads."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from optserve.tls import Tls

if TYPE_CHECKING:
    import grpc

    Interceptor = (
        grpc.UnaryUnaryClientInterceptor
        | grpc.UnaryStreamClientInterceptor
        | grpc.StreamUnaryClientInterceptor
        | grpc.StreamStreamClientInterceptor
    )

_FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
# gRPC's own fork handlers abort or hang a forked process at random while threads are in calls, also one that uses no
# gRPC, such as a worker of torch's DataLoader. gRPC reads this when it is first used.
os.environ.setdefault(_FORK_SUPPORT, "0")

_METADATA_KEY = re.compile(r"(?!grpc-)[0-9a-z_.-]+")
_METADATA_TEXT = re.compile(r"[ -~]*")


@dataclass(frozen=True)
class ClientConfig:
    """How a client talks to its server. All times are finite, so nothing hangs for ever."""

    connect_timeout_s: float = 10.0
    """Seconds that `connect` waits for the server's first answer."""
    timeout_s: float = 30.0
    """Seconds that any other call may take, retries included."""
    step_timeout_s: float = 300.0
    """Seconds that a step, a checkpoint, a restore, an export or an import may take, reconnections included."""
    initial_backoff_s: float = 0.05
    """Seconds before the first retry; the pause doubles with each retry."""
    max_backoff_s: float = 2.0
    """Longest pause between retries, in seconds; while no server answers, it is at most a tenth of a second."""
    transport: Literal["auto", "grpc", "shm"] = "auto"
    """How tensors travel if `Client.optimizer` does not choose: `auto` shares memory with a server on the same host."""
    max_chunk_bytes: int = 0
    """Largest payload of one message, both ways; 0 for the server's preference. The server's limit applies too."""
    max_receive_bytes: int = 64 << 20
    """Largest payload of a message that the client accepts from the server, or sends to it."""
    keep_freed_memory: bool = True
    """Let glibc's allocator, in the whole process, keep up to 16 MiB of freed memory per arena. By default it returns
    the memory after every message. Large steps over gRPC then take a quarter less time."""
    keepalive_s: float = 60.0
    """Seconds of silence after which the client probes a connection with a call on it. Servers close connections that
    probe too often."""
    tls: Tls | None = None
    """The certificates of a secured connection; None for an unsecured one."""
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    """Credentials of gRPC's own, in place of `tls`, such as `grpc.ssl_channel_credentials(…)`."""
    metadata: Sequence[tuple[str, str | bytes]] = field(default=(), repr=False)
    """Pairs (key, value) that the client sends with every call. Keys consist of a-z, 0-9, '_', '.' and '-'. Values are
    bytes if the key ends in `-bin`, otherwise printable ASCII. They are not secret on an unsecured connection."""
    interceptors: Sequence[Interceptor] = field(default=(), repr=False)
    """gRPC's client interceptors. They see every call in their order, after `metadata` was added."""

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
        if self.tls is not None and self.credentials is not None:
            raise ValueError("tls and credentials exclude each other.")
        object.__setattr__(self, "metadata", tuple((key, value) for key, value in self.metadata))
        object.__setattr__(self, "interceptors", tuple(self.interceptors))
        for key, value in self.metadata:
            _check_metadata(key, value)


def _check_metadata(key: str, value: str | bytes) -> None:
    """Raise ValueError for a pair that gRPC does not send.

    The value may be a secret, so no error shows it. No error shows an invalid key either: the two may be swapped.
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
    """Name of the environment variable from which gRPC takes its proxy; empty if it uses no proxy."""
    return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), "")


def no_proxy_hosts() -> list[str]:
    """Names, suffixes and networks that gRPC reaches without the proxy."""
    listed = next((listed for name in ("no_grpc_proxy", "no_proxy") if (listed := os.environ.get(name))), "")
    return [entry for item in listed.split(",") if (entry := item.strip())]


def has_fork_handlers() -> bool:
    """Whether the user has switched gRPC's fork handlers on."""
    return os.environ.get(_FORK_SUPPORT, "").lower() in ("1", "true", "yes", "y", "t")


def environment_without_settings() -> dict[str, str]:
    """The environment without OPTSERVE_…, for a local server.

    Variables that are meant for another server, of this machine or this container, would reach it.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("OPTSERVE_")}
