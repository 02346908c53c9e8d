"""Puts the parts of the server together, runs them, and stops them in order."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from rich.console import Console
from rich.progress import Progress

from optserve._common import malloc, wire
from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.config import ConfigError, ServerConfig
from optserve_server.domain.descriptors import room_for_connections
from optserve_server.edge.gate.drain_gate import DrainGate
from optserve_server.edge.gate.interceptors import Gate
from optserve_server.edge.health import Health
from optserve_server.edge.service import SERVICE, Servicer, handlers
from optserve_server.engine.durability import InMemory
from optserve_server.engine.registry import Optimizers
from optserve_server.numerics import backends
from optserve_server.persistence.checkpoint_store import FolderStore, Limits, Store, TemporaryStore
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.data_folder import DataFolder
from optserve_server.persistence.journal import JournalError

logger = logging.getLogger(__name__)

CLOSING_S = 1.0
"""Seconds that clients have to take their last answers when the server stops; then their connections are closed."""

NO_COMPRESSION = 1
"""gRPC's bit set of accepted compression algorithms, with none but the identity."""

SEARCHES_PER_IDLE_TIME = 4
"""Number of searches for idle steps during `idle_step_s`."""


class App:
    """A server. It answers calls from `start` to `stop`.

    Args:
        config: The settings.
        credentials: Credentials for the port, such as `grpc.ssl_server_credentials(…)`; None for those of the settings.
        interceptors: gRPC's server interceptors. Each sees every call before the call has a place and a thread, and may
            refuse it. They run in gRPC's only event thread. If an interceptor returns another handler than that of the
            method, the handler runs in the few threads for refusals.
        clock: The time for everything below the edge.

    Attributes:
        target: The address that clients connect to.
    """

    def __init__(
        self,
        config: ServerConfig,
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        clock: Clock = SYSTEM,
    ) -> None:
        self._config = config
        # Before the recovery, which may take long: files that cannot be used are an error at once.
        credentials = credentials or _credentials(config, clock)
        self._drain_gate = DrainGate()
        self._stopping = threading.Event()
        choice = backends.choose(config.backend, config.threads)
        self._folder = _data_folder(config, clock)
        self._optimizers = optimizers = Optimizers(choice.backend, self._folder or InMemory(), config, clock)
        if self._folder is not None:
            self._recover(self._folder, optimizers)
        store = _checkpoint_store(config, self._folder, clock)
        checkpoints = Checkpoints(optimizers, store, config.max_checkpoints, clock)
        self._gate = Gate(config)
        self._server = grpc.server(
            self._gate.refusals, interceptors=[*interceptors, self._gate], options=_options(config)
        )
        servicer = Servicer(optimizers, checkpoints, self._drain_gate, choice, config, clock)
        self._server.add_generic_rpc_handlers((handlers(servicer),))
        self._health = Health(("", SERVICE.full_name))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.target = self._listen(credentials)

    def _recover(self, folder: DataFolder, optimizers: Optimizers) -> None:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("recovering", total=None)
            result = folder.recover(optimizers, lambda done, total: progress.update(task, completed=done, total=total))
        logger.info("%s", result.summary)

    def _listen(self, credentials: grpc.ServerCredentials | None) -> str:
        config = self._config
        if config.uds:
            _check_unused(config.uds)
        # An IPv6 address has colons of its own.
        host = f"[{config.host}]" if ":" in config.host and not config.host.startswith("[") else config.host
        address = f"unix:{config.uds}" if config.uds else f"{host}:{config.port}"
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"Cannot listen on {address}: is it in use, or not this machine's?") from error
        return address if config.uds else f"{host}:{port}"

    def start(self) -> None:
        """Begin to answer calls."""
        # Without this, each full garbage collection would walk all objects of Numba, and delay calls by 0.1 s.
        gc.collect()
        gc.freeze()
        self._server.start()
        threading.Thread(target=self._discard_idle_steps, name="idle steps", daemon=True).start()
        self._health.set(health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving on %s, durability %s", self.target, self._config.durability)
        if self._folder is not None:
            self._folder.start_snapshots(self._on_folder_checked)
        elif self._config.data_dir:
            logger.warning("durability is memory: nothing is written to %s", self._config.data_dir)

    def _on_folder_checked(self, in_place: bool) -> None:
        """Report NOT_SERVING while the data folder is not in place, because the server refuses every change then."""
        if not self._stopping.is_set():
            status = health_pb2.HealthCheckResponse.SERVING if in_place else health_pb2.HealthCheckResponse.NOT_SERVING
            self._health.set(status)

    def _discard_idle_steps(self) -> None:
        while not self._stopping.wait(self._config.idle_step_s / SEARCHES_PER_IDLE_TIME):
            self._optimizers.discard_idle_steps()

    def stop(self) -> bool:
        """Refuse new steps, let steps under way end, then close every connection. No stage waits for a client.

        Returns:
            Whether all threads have ended.
        """
        self._stopping.set()
        # First, so that the server already refuses steps when clients hear that it stops.
        self._drain_gate.close()
        self._health.close()
        until = time.monotonic() + self._config.drain_s
        # In a thread, because each optimizer's lock is needed, and a step may hold it.
        draining = threading.Thread(target=self._optimizers.drain, name="drain", daemon=True)
        draining.start()
        draining.join(self._config.drain_s)
        if not self._drain_gate.drain(max(0.0, until - time.monotonic())):
            logger.warning("steps were still under way after %s s and are discarded", self._config.drain_s)
        if not self._server.stop(grace=CLOSING_S).wait(2 * CLOSING_S):
            logger.warning("some calls have not ended %s s after they were cancelled", CLOSING_S)
        ended = self._gate.close(CLOSING_S)
        if not ended:
            logger.warning("some threads have not ended %s s after their calls; they end with the process", CLOSING_S)
        if self._folder is not None:
            self._folder.close()
        logger.info("stopped")
        return ended


ARENAS = 4
"""Arenas of the C library's allocator. The freed memory that they keep is a part of `ServerConfig.wire_bytes`. glibc's
default is 8 for each processor, which hundreds of threads would fill."""


def run(config: ServerConfig, *, announce: bool, exit_on_eof: bool, target_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: The settings.
        announce: Print `ready TARGET` on standard output once the server answers.
        exit_on_eof: Stop as well when standard input ends, that is, when the parent process has ended.
        target_file: A file that contains the target while the server answers.
    """
    # The system may deliver a signal to any thread. Then a main thread that waits for an event does not wake up, but
    # the wakeup descriptor is written in any case.
    wish_to_stop, stop = os.pipe()
    os.set_blocking(stop, False)
    signal.set_wakeup_fd(stop, warn_on_full_buffer=False)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        logger.info("%s: draining", signal.Signals(number).name)

    malloc.keep_freed_memory(ARENAS)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if target_file:
        _write_target(target_file, "")
    app = App(config)
    app.start()
    if target_file:
        _write_target(target_file, app.target)
    if announce:
        print(f"ready {app.target}", flush=True)
    if exit_on_eof:
        threading.Thread(target=_wait_for_eof, args=(stop,), daemon=True).start()
    os.read(wish_to_stop, 1)
    ended = app.stop()
    if target_file:
        _write_target(target_file, "")
    if not ended:
        # The interpreter would wait for these threads at its end. All data is on disk.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _write_target(path: Path, target: str) -> None:
    """Write the target into a file; remove the file if the target is empty."""
    try:
        if not target:
            path.unlink(missing_ok=True)
            return
        whole = path.with_name(f"{path.name}.{os.getpid()}")
        whole.write_text(f"{target}\n", encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        logger.warning("the target file %s cannot be written: %s", path, error)


def _wait_for_eof(stop: int) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.write(stop, b"\0")


def _check_unused(path: str) -> None:
    """Raise ConfigError if a server answers at a Unix socket: gRPC would replace the socket silently.

    A socket where nobody listens is left by a killed server, and may be replaced.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise ConfigError(f"Cannot listen on unix:{path}: {error}") from error
    raise ConfigError(f"Cannot listen on unix:{path}: another server listens there. Stop it, or choose another path.")


def _credentials(config: ServerConfig, clock: Clock) -> grpc.ServerCredentials | None:
    """The credentials that the settings name; None for a port without.

    Raises:
        ConfigError: Their files cannot be used.
    """
    if not config.tls_certificate:
        return None
    # Imported late, because only a secured port needs the library.
    from optserve_server.edge.certificates import Certificates

    authority = Path(config.tls_client_authority) if config.tls_client_authority else None
    certificates = Certificates(Path(config.tls_certificate), Path(config.tls_key), authority, clock)
    logger.info("connections are secured: certificate %s", certificates.summary)
    return certificates.credentials


def _data_folder(config: ServerConfig, clock: Clock) -> DataFolder | None:
    if config.durability == "memory":
        return None
    interval_s = config.snapshot_interval_s if config.durability == "snapshot" else 0.0
    return DataFolder(Path(config.data_dir), config.snapshot_bytes, config.segment_bytes, interval_s, clock)


def _checkpoint_store(config: ServerConfig, folder: DataFolder | None, clock: Clock) -> Store:
    """The store of checkpoints, with its limits.

    Raises:
        JournalError: The folder with the checkpoints cannot be read.
    """
    where = Path(config.data_dir if folder else tempfile.gettempdir())
    try:
        disk = os.statvfs(where)
        # Half, so that the journal and its snapshots find room.
        limits = Limits(config.max_total_checkpoints, config.max_checkpoint_bytes or disk.f_blocks * disk.f_frsize // 2)
        if folder is None:
            return TemporaryStore(limits, clock)
        return FolderStore(where / "checkpoints", limits, folder.check_in_place, clock)
    except OSError as error:
        raise JournalError(f"The checkpoints in {where} cannot be read: {error}.") from error


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_frame_bytes),
        ("grpc.max_send_message_length", config.max_frame_bytes),
        *wire.http2_options(),
        ("grpc.so_reuseport", 0),
        # Compression hardly shrinks gradients, and lets a few bytes become messages of the largest size.
        ("grpc.compression_enabled_algorithms_bitset", NO_COMPRESSION),
        ("grpc.max_allowed_incoming_connections", room_for_connections(config.max_connections, config.max_streams)),
        ("grpc.max_connection_idle_ms", 1000 * config.connection_idle_s),
        ("grpc.server_handshake_timeout_ms", round(1000 * config.receive_s)),
        ("grpc.max_concurrent_streams", config.max_connection_streams),
        ("grpc.keepalive_time_ms", 1000 * config.keepalive_s),
        # Clients that probe more often than this are cut off by gRPC ("too_many_pings"), so allow for twice ours.
        ("grpc.http2.min_ping_interval_without_data_ms", 500 * config.keepalive_s),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
