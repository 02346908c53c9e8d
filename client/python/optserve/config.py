"""The client's settings, and what it reads of the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal


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
    """A silent connection with a call on it is probed after so long. Servers cut off those who probe too often."""

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


def proxy_variable() -> str:
    """Name of the environment variable that gRPC takes its proxy from; empty where it takes none."""
    return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), "")


def no_proxy_hosts() -> list[str]:
    """Names, suffixes and networks that gRPC reaches without the proxy."""
    listed = next((listed for name in ("no_grpc_proxy", "no_proxy") if (listed := os.environ.get(name))), "")
    return [entry for item in listed.split(",") if (entry := item.strip())]
