"""What durability costs: a step with a journal, a step while a snapshot is written, and a recovery."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

import optserve
from benchmarks.measure import Candidate, Timing, interleaved
from optserve_server.domain.config import ServerConfig
from optserve_server.engine.registry import Optimizers
from optserve_server.numerics import backends
from optserve_server.persistence import journal
from optserve_server.persistence.data_folder import DataFolder

Transport = Literal["grpc", "shm"]

IN_MEMORY = "in memory"
JOURNAL = "with a journal"
QUIET = "no snapshot"
SNAPSHOTTING = "snapshots all the time"
READ = "sequential read"

NEVER = 1 << 50
_RECOVERED_BYTES = 1 << 30


@contextmanager
def _step(size: int, snapshot_bytes: int | None, transport: Transport) -> Iterator[Candidate]:
    """A step through a server; with a journal if `snapshot_bytes` is given."""
    gradient = {"x": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    out = {"x": np.empty(size, np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "optserve.toml"
        config.write_text(f"snapshot_bytes = {snapshot_bytes or NEVER}\n")
        data_dir = Path(folder) / "data" if snapshot_bytes else None
        with (
            optserve.local_server(data_dir, options=["--config", str(config)]) as server,
            optserve.connect(server.target) as client,
        ):
            client.create_optimizer("bench", optserve.Adadelta(), gradient)
            optimizer = client.optimizer("bench", transport=transport)
            yield Candidate(lambda: optimizer.step(gradient, out=out))


def _measure(size: int, rounds: int, servers: dict[str, tuple[int | None, Transport]]) -> dict[str, Timing]:
    with ExitStack() as stack:
        candidates = {name: stack.enter_context(_step(size, *options)) for name, options in servers.items()}
        return interleaved(candidates, rounds)


def journal_cost(size: int, rounds: int) -> dict[str, Timing]:
    """A step of `size` float32 parameters in memory, and with a journal in the folder for temporary files."""
    return _measure(
        size,
        rounds,
        {
            IN_MEMORY: (None, "grpc"),
            JOURNAL: (NEVER, "grpc"),
            "in memory, shared with the client": (None, "shm"),
            "with a journal, shared with the client": (NEVER, "shm"),
        },
    )


def snapshot_stalls(size: int, rounds: int) -> dict[str, Timing]:
    """A journalled step without any snapshot, and on a server that begins one every third step or so.

    That is as soon as the journal has outgrown the state again.
    """
    return _measure(size, rounds, {QUIET: (NEVER, "grpc"), SNAPSHOTTING: (1 << 20, "grpc")})


def recovery(size: int, rounds: int) -> dict[str, Timing]:
    """Recovery from a journal of 1 GiB of steps, and reading its files, both with none of them in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "optserve.toml"
        config.write_text(f"snapshot_bytes = {NEVER}\n")
        data = Path(folder) / "data"
        gradient = {"x": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
        with (
            optserve.local_server(data, options=["--config", str(config)]) as server,
            optserve.connect(server.target) as client,
        ):
            optimizer = client.create_optimizer("bench", optserve.Adadelta(), gradient)
            for _ in range(_RECOVERED_BYTES // (4 * size)):
                optimizer.step(gradient)
            server.process.kill()
        backend = backends.choose("auto", 0).backend

        def recover() -> None:
            opened = DataFolder(data, NEVER, 1 << 20)
            opened.recover(Optimizers(backend, opened, ServerConfig(data_dir=str(data))), lambda _done, _total: None)
            opened.close(snapshot=False)

        candidates = {
            READ: Candidate(lambda: _read(data), lambda: _forget(data)),
            "recovery": Candidate(recover, lambda: _forget(data)),
        }
        return interleaved(candidates, rounds)


def _read(folder: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in journal.segment_paths(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in journal.segment_paths(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
