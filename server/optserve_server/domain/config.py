"""The server's settings: one frozen dataclass, which is checked once. `config_sources.py` says what fills it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from optserve._common import machine

MIB = 1 << 20
GIB = 1 << 30

NUMPY_BYTES, COMPILER_BYTES = 96 * MIB, 192 * MIB
"""Bytes that the process itself takes: with NumPy alone, and with Numba or CuPy, which compile kernels."""

UNASKED_CHUNK_BYTES = 4 * MIB - 4096
"""Largest payload for a client that has not asked for larger ones. By default gRPC's clients take messages of 4 MiB,
with the header."""


MAX_S = 14 * 86_400
"""Most seconds that a setting may have: gRPC counts milliseconds, in 31 bits."""


class ConfigError(ValueError):
    """A setting has an impossible value. The message says which setting, and why.

    Attributes:
        setting: Its name; empty if the error is not about one setting.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class ServerConfig:
    """All settings. The keys of a configuration file are the names of the fields."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or [::] for all. Ignored if `uds` is set."""
    port: int = 50051
    """TCP port; 0 takes a free one."""
    uds: str = ""
    """Path of a Unix socket to listen on instead of TCP."""
    tls_certificate: str = ""
    """PEM file with the server's certificate, then those that lead to its authority. With it, TLS secures connections.
    The server reads the file anew when it has changed."""
    tls_key: str = ""
    """PEM file with the private key of `tls_certificate`, not encrypted."""
    tls_client_authority: str = ""
    """PEM file with the authority of the clients' certificates. With it, only clients with such a certificate are let
    in."""
    data_dir: str = ""
    """Folder for the journal, snapshots and checkpoints, which outlive the process."""
    durability: str = ""
    """`memory`: the state ends with the process. `snapshot`: the server writes the state every `snapshot_interval_s`.
    `journal`: every step is on disk before it is acknowledged; the default with a data folder."""
    snapshot_interval_s: float = 60.0
    """Seconds between snapshots if durability is `snapshot`; a crash loses the steps since the last snapshot."""
    snapshot_bytes: int = 512 * MIB
    """Bytes of the journal after which a snapshot replaces it; at least the size of the state counts."""
    segment_bytes: int = 64 * MIB
    """Size of a file of the journal."""
    backend: str = "auto"
    """`auto`, `cupy`, `numba` or `numpy`."""
    threads: int = 0
    """Threads that a CPU kernel uses; 0 for one per core that the server may use, within a container's quota."""
    max_streams: int = 256
    """Streams open at the same time; each occupies a thread."""
    unary_threads: int = 16
    """Threads beyond those of the streams, so that unary calls and health checks are always answered."""
    max_connections: int = 4096
    """Connections at the same time, fewer if the system grants too few descriptors; the server closes more at once."""
    connection_idle_s: int = 300
    """Seconds after which the server closes a connection without a call; its client opens another when needed."""
    max_connection_streams: int = 1024
    """Calls at the same time on one connection; the client delays further calls."""
    max_watchers: int = 64
    """Clients that watch the server's health (grpc.health.v1.Health/Watch) at the same time; each occupies a thread."""
    max_reply_bytes: int = 0
    """Bytes of replies of unary calls that clients have not taken yet, with their calls; a single reply may be larger.
    0 for 64 MiB, or a sixty-fourth of `memory_bytes` if that is less."""
    max_chunk_bytes: int = 4 * MIB
    """Largest payload of one chunk."""
    preferred_chunk_bytes: int = 0
    """Size of the chunks that the server sends, and advises clients to send; 0 for 2 MiB, or less if
    `max_chunk_bytes` is less. Chunks of more than UNASKED_CHUNK_BYTES, which not every gRPC client takes, go only to
    clients that ask for them."""
    max_message_bytes: int = 4 * MIB
    """Largest unary request, and largest unary reply; most gRPC clients accept no more by default."""
    max_parameter_bytes: int = 64 * GIB
    """Largest total size of one optimizer's parameters."""
    max_parameters: int = 20_000
    """Largest number of parameters of one optimizer."""
    max_optimizers: int = 1000
    """Most optimizers at the same time."""
    max_checkpoints: int = 1000
    """Most checkpoints of one optimizer."""
    max_total_checkpoints: int = 10_000
    """Most checkpoints of all optimizers, deleted optimizers included."""
    max_checkpoint_bytes: int = 0
    """Bytes of all checkpoints; 0 for half of the disk that they are on."""
    memory_bytes: int = 0
    """Memory that this process may use; 0 for that of the machine, or of its container if that is less."""
    max_state_bytes: int = 0
    """Bytes of the states, staging buffers and descriptions of all optimizers; 0 for nine tenths of what the process
    itself, messages, pulls and replies leave of `memory_bytes`."""
    max_staged_bytes: int = 0
    """Bytes of the staging buffers of all workers, with the replies in them, beside `max_state_bytes`; 0 for a ninth of
    `max_state_bytes`."""
    max_optimizer_staged_bytes: int = 0
    """Bytes of the staging buffers of one optimizer's workers; 0 for half of `max_staged_bytes`, so that other
    optimizers always find memory."""
    max_pull_bytes: int = 0
    """Bytes of the copies of hosted parameters that the server is sending; a single copy may be larger. 0 for 1 GiB, or
    a sixteenth of `memory_bytes` if that is less."""
    idle_step_s: float = 60.0
    """Seconds without progress after which the server discards a step, a transfer, or a reply that its client does not
    take. If all places are taken, a stream that was silent for so long is evicted for a new one."""
    receive_s: float = 10.0
    """Seconds until a call must have sent its message, or its first message. A unary call may take as long as
    `max_message_bytes` take at 64 KiB a second, if that is longer."""
    keepalive_s: int = 60
    """Seconds of silence after which the server probes a connection; clients may probe twice as often."""
    drain_s: float = 20.0
    """Seconds that steps under way may take to end after SIGTERM."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: A value is impossible; the first such value.
        """
        for item in fields(self):
            self._check_type(item.name, str(item.type))
        for name in (
            "max_streams",
            "unary_threads",
            "max_parameters",
            "max_optimizers",
            "max_checkpoints",
            "max_total_checkpoints",
            "max_connections",
            "connection_idle_s",
            "max_connection_streams",
            "max_watchers",
            "keepalive_s",
        ):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("max_chunk_bytes", "max_message_bytes"):
            self._require(name, 1024 <= getattr(self, name) <= 64 * MIB, "must be 1024 bytes to 64 MiB")
        if self.preferred_chunk_bytes == 0:
            object.__setattr__(self, "preferred_chunk_bytes", min(2 * MIB, self.max_chunk_bytes))
        self._require(
            "preferred_chunk_bytes",
            1024 <= self.preferred_chunk_bytes <= self.max_chunk_bytes,
            "must be 1024 to max_chunk_bytes",
        )
        self._check_port()
        self._require("threads", self.threads >= 0, "must not be negative")
        self._require("drain_s", self.drain_s >= 0, "must not be negative")
        self._require("receive_s", 0 < self.receive_s <= 3600, "must be positive and at most an hour, 3600")
        self._require("idle_step_s", 0 < self.idle_step_s <= 86_400, "must be positive and at most a day, 86400")
        self._require("max_checkpoint_bytes", self.max_checkpoint_bytes >= 0, "must not be negative")
        self._divide_memory()
        if not self.durability:
            object.__setattr__(self, "durability", "journal" if self.data_dir else "memory")
        self._require(
            "durability", self.durability in ("memory", "snapshot", "journal"), "must be memory, snapshot or journal"
        )
        self._require(
            "data_dir",
            bool(self.data_dir) or self.durability == "memory",
            f"must be set if durability is {self.durability}",
        )
        self._require("snapshot_interval_s", self.snapshot_interval_s > 0, "must be positive")
        for name in ("snapshot_bytes", "segment_bytes"):
            self._require(name, getattr(self, name) >= MIB, "must be at least 1 MiB")

    def _check_type(self, name: str, kind: str) -> None:
        value = getattr(self, name)
        if type(value).__name__ not in ((kind, "int") if kind == "float" else (kind,)):
            raise ConfigError(f"{name} must be of type {kind}, not {value!r}.", name)
        if kind == "str":
            self._require(name, "\0" not in value, "must not contain a null character")
            return
        most = MAX_S if name.endswith("_s") else (1 << 63) - 1 if name.endswith("_bytes") else (1 << 31) - 1
        self._require(name, value <= most, f"must be at most {most}")
        if kind == "float":
            object.__setattr__(self, name, float(value))

    def _check_port(self) -> None:
        self._require("host", bool(self.host.strip()) or bool(self.uds), "must not be empty")
        self._require("port", 0 <= self.port <= 65535, "must be 0 to 65535")
        self._require(
            "tls_key", bool(self.tls_key) == bool(self.tls_certificate), "must be set together with tls_certificate"
        )
        self._require(
            "tls_client_authority",
            bool(self.tls_certificate) or not self.tls_client_authority,
            "needs tls_certificate and tls_key",
        )

    def _divide_memory(self) -> None:
        """Compute the limits of memory that are 0."""
        self._derive("memory_bytes", machine.usable_bytes())
        self._derive("max_pull_bytes", min(GIB, self.memory_bytes // 16))
        self._derive("max_reply_bytes", min(64 * MIB, self.memory_bytes // 64))
        self._derive("max_state_bytes", self._bytes_for_optimizers * 9 // 10)
        self._derive("max_staged_bytes", self.max_state_bytes // 9)
        self._derive("max_optimizer_staged_bytes", self.max_staged_bytes // 2)

    def _derive(self, name: str, value: int) -> None:
        self._require(name, getattr(self, name) >= 0, "must not be negative")
        if getattr(self, name) == 0:
            object.__setattr__(self, name, max(1, value))

    @property
    def _bytes_for_optimizers(self) -> int:
        """Memory for states and staging buffers: what the process itself, messages, pulls and replies leave."""
        own = NUMPY_BYTES if self.backend == "numpy" else COMPILER_BYTES
        return max(0, self.memory_bytes - own - self.wire_bytes - self.max_pull_bytes - self.max_reply_bytes)

    @property
    def wire_bytes(self) -> int:
        """Memory that is reserved for the messages of all streams."""
        return min(2 * GIB, self.memory_bytes // 10)

    @property
    def room_bytes(self) -> int:
        """Bytes for states and for what a recovery needs beside them. `max_state_bytes` does not change it."""
        room = self._bytes_for_optimizers
        return room - min(self.max_staged_bytes, room // 10)

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ConfigError(f"{name} {what}; it is {getattr(self, name)!r}.", name)

    @property
    def sent_chunk_bytes(self) -> int:
        """Size of the chunks that the server sends to clients that do not say how large they may be."""
        return min(self.preferred_chunk_bytes, UNASKED_CHUNK_BYTES)

    @property
    def max_frame_bytes(self) -> int:
        """Limit of a message in gRPC itself. It is above the server's limits, whose errors explain more than gRPC's."""
        return 2 * max(self.max_chunk_bytes, self.max_message_bytes) + MIB
