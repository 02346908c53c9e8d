"""The data folder: a lock, a journal, snapshots; and the recovery of all optimizers from them.

With durability `journal`, every change is in the journal, on disk, before it is made and acknowledged, and from time
to time a snapshot takes the place of what came before it. Recovery loads the last snapshot and replays the journal:
the same kernels on the same gradients in the same order, so the same bits. With durability `snapshot` there are
snapshots only, taken at intervals.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from optserve_server import recovery, snapshot
from optserve_server.durability import CreationRecord, PlacementRecord, ReplacementRecord, StepRecord
from optserve_server.errors import OptserveError, Reason, disk_errors
from optserve_server.journal import Journal, JournalError, Reader, segment_paths, set_newest, sync_folder
from optserve_server.optimizers import Optimizers
from optserve_server.settings import Settings

logger = logging.getLogger(__name__)


UNCLEAN = "UNCLEAN"
"""A file that says that steps which had been acknowledged may be missing here."""


def set_unclean(folder: Path, *, unclean: bool) -> None:
    """Make or remove the file that says so, durably."""
    marker = folder / UNCLEAN
    if unclean != marker.exists():
        marker.touch() if unclean else marker.unlink()
        sync_folder(folder)


@dataclass
class Recovered:
    """What recovery found."""

    optimizers: int = 0
    snapshot_lsn: int = 0
    records: int = 0
    steps: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    torn: tuple[Path, int] | None = None


class FolderLock:
    """Keeps every other server out of a data folder, until it is released or the process ends.

    Raises:
        JournalError: The folder cannot be used, or another server uses it.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise JournalError(f"The data folder {path} cannot be used: {error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise JournalError(f"Another server uses the data folder {path}; stop it or choose another one.") from error

    def release(self) -> None:
        """Let others in."""
        os.close(self._descriptor)


class _Unjournalled:
    """Stands in for the journal where there is none: numbers the changes and forgets them."""

    def __init__(self, folder: Path, next_lsn: int) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.last_lsn = next_lsn - 1

    def append(self, kind: int, meta: bytes, payload: Sequence[memoryview] = ()) -> int:  # noqa: ARG002 - see Journal
        """The number of a change."""
        with self._lock:
            self.last_lsn += 1
            return self.last_lsn

    def cut_before(self, lsn: int) -> None:  # noqa: ARG002
        """Remove what an earlier server with a journal has left; it has been recovered and is in the snapshot."""
        if paths := segment_paths(self._folder):
            set_newest(self._folder, None)
            for path in paths:
                path.unlink()

    def close(self) -> None:
        """Nothing to close."""


class DataFolder:
    """Durability by journal or by snapshots. It is given to the optimizers first, then `recover` fills and opens it.

    Args:
        path: The folder; made if it is not there.
        snapshot_bytes: Journal bytes after which a snapshot is due; never less than the state's own size.
        segment_bytes: Size of a journal segment.
        interval_s: Take snapshots so often, and keep no journal; 0 for a journal.

    Raises:
        JournalError: It cannot be used, or another server uses it.
    """

    reads_staging = True

    def __init__(self, path: Path, snapshot_bytes: int, segment_bytes: int, interval_s: float = 0.0) -> None:
        self._path = path
        self._snapshot_bytes = snapshot_bytes
        self._segment_bytes = segment_bytes
        self._interval_s = interval_s
        self._journal: Journal | _Unjournalled | None = None
        self._bytes_since_snapshot = 0
        self._bytes_at_failure = 0
        self._counting = threading.Lock()
        self._snapshot_due = threading.Event()
        self._stopping = threading.Event()
        self._snapshotter: threading.Thread | None = None
        self._lock = FolderLock(path)

    # --- Durability

    def created(self, record: CreationRecord) -> int:
        """Keep a creation."""
        return self._append(recovery.CREATED, recovery.creation(record))

    def updated(self, optimizer: str, settings: Settings, etag: str, time: datetime) -> int:
        """Keep a change of hyper-parameters."""
        return self._append(recovery.UPDATED, recovery.update(optimizer, settings, etag, time))

    def replaced(self, record: ReplacementRecord) -> int:
        """Keep a state that takes the place of another."""
        arrays = [array for _, _, array in record.arrays]
        return self._append(recovery.REPLACED, recovery.replacement(record), arrays)

    def deleted(self, optimizer: str) -> int:
        """Keep a deletion."""
        return self._append(recovery.DELETED, {"optimizer": optimizer})

    def placing(self, record: PlacementRecord) -> int:
        """Keep the parameters."""
        return self._append(recovery.PLACED, recovery.placement(record), record.parameters)

    def stepping(self, record: StepRecord) -> int:
        """Keep the gradients of a step."""
        return self._append(recovery.STEPPED, recovery.step(record), record.operands)

    def _append(self, kind: int, message: dict[str, Any], payload: Sequence[np.ndarray] = ()) -> int:
        if self._journal is None:
            raise OptserveError(Reason.DRAINING, "The data folder is not open.")
        parts = [array.data.cast("B") for array in payload if array.size]
        with disk_errors():
            lsn = self._journal.append(kind, json.dumps(message).encode(), parts)
        with self._counting:
            # At least 1, so that any change counts.
            self._bytes_since_snapshot += 1 + sum(len(part) for part in parts)
        if self._is_snapshot_due(kind):
            self._snapshot_due.set()
        return lsn

    def _is_snapshot_due(self, kind: int) -> bool:
        if self._interval_s:
            # These are rare, and worth having soon.
            return kind in (recovery.CREATED, recovery.PLACED, recovery.REPLACED, recovery.DELETED)
        limit = max(self._snapshot_bytes, self._optimizers.memory_bytes)
        # After a failure, not before the journal has grown by as much again.
        return self._bytes_since_snapshot > self._bytes_at_failure + limit

    # --- Recovery

    def recover(self, optimizers: Optimizers, on_progress: Callable[[int, int], None]) -> Recovered:
        """Bring back all optimizers, and open the journal for what comes.

        Args:
            optimizers: Empty.
            on_progress: Told (bytes done, bytes in all).

        Raises:
            JournalError: What had been acknowledged cannot be read. Nothing was changed.
        """
        start = time.perf_counter()
        found = Recovered()
        replay = recovery.Replay(optimizers)
        snapshots = snapshot.paths(self._path)
        if snapshots:
            found.snapshot_lsn, saved = snapshot.read(snapshots[-1])
            for item in saved:
                replay.load(item)
        replayed_bytes = 0
        reader = Reader(self._path, found.snapshot_lsn)
        total = reader.total_bytes
        for record in reader:
            found.steps += record.type == recovery.STEPPED
            found.records += 1
            replayed_bytes += len(record.meta) + len(record.payload)
            replay.redo(record)
            on_progress(reader.bytes_read, total)
        replay.finish()
        found.torn, found.bytes_read, found.optimizers = reader.torn, reader.bytes_read, len(optimizers)
        found.seconds = time.perf_counter() - start
        self._bytes_since_snapshot = replayed_bytes
        self._optimizers = optimizers
        self._open(reader)
        self._tell_of_lost_steps()
        for leftover in (*self._path.glob("*.tmp"), *snapshots[:-1]):
            if leftover.exists():
                _remove(leftover)
        return found

    def _open(self, reader: Reader) -> None:
        """Begin to number and keep what comes after what was read."""
        if self._interval_s:
            self._journal = _Unjournalled(self._path, reader.next_lsn)
            if segment_paths(self._path):
                self.snapshot()
        else:
            self._journal = Journal(self._path, reader.next_lsn, self._segment_bytes)

    def _tell_of_lost_steps(self) -> None:
        """Give every state a new lineage where steps may have been lost, so that clients that knew them are told."""
        if (self._path / UNCLEAN).exists():
            self._optimizers.renew_lineages()
            self.snapshot()
        # Without a journal, a crash loses steps again from here on.
        set_unclean(self._path, unclean=bool(self._interval_s))

    # --- Snapshots

    def start_snapshots(self) -> None:
        """Take snapshots in the background whenever one is due."""
        self._snapshotter = threading.Thread(target=self._take_snapshots, name="snapshots", daemon=True)
        self._snapshotter.start()

    def _take_snapshots(self) -> None:
        while True:
            self._snapshot_due.wait(self._interval_s or None)
            # Cleared before the look at `stopping`, which `close` sets first: neither can be missed.
            self._snapshot_due.clear()
            if self._stopping.is_set():
                return
            if not self._bytes_since_snapshot:
                continue
            try:
                self.snapshot()
            # Whatever it was, this thread must go on: without snapshots the journal would grow for ever.
            except Exception:
                self._bytes_at_failure = self._bytes_since_snapshot
                logger.exception("a snapshot could not be written; it is tried again later")

    def snapshot(self) -> Path:
        """Take a snapshot now, and cut what it makes superfluous."""
        if self._journal is None:
            raise JournalError("The data folder is not open.")
        # Counted first: what comes in between is counted once more, never forgotten.
        before = self._bytes_since_snapshot
        lsn = self._journal.last_lsn
        old = snapshot.paths(self._path)
        path = snapshot.write(self._path, lsn, self._optimizers.settled(), still=bool(self._interval_s))
        for leftover in old:
            if leftover != path:
                _remove(leftover)
        self._journal.cut_before(lsn + 1)
        with self._counting:
            self._bytes_since_snapshot -= before
            self._bytes_at_failure = 0
        logger.info("snapshot %s", path.name)
        return path

    def close(self) -> None:
        """Take a last snapshot, so that the next start is quick, and let go of the folder."""
        self._stopping.set()
        self._snapshot_due.set()
        if self._snapshotter is not None:
            self._snapshotter.join()
        if self._journal is not None:
            try:
                if self._bytes_since_snapshot:
                    self.snapshot()
                set_unclean(self._path, unclean=False)
            # Stopping goes on; a journal has everything.
            except Exception:
                logger.exception("the last snapshot could not be written")
            self._journal.close()
            self._journal = None
        self._lock.release()


def describe(found: Recovered) -> str:
    """What recovery found, in a line."""
    rate = found.bytes_read / max(found.seconds, 1e-9) / 1e6
    text = (
        f"recovered {found.optimizers} optimizers: snapshot at {found.snapshot_lsn}, then {found.records} records with "
        f"{found.steps} steps, {found.bytes_read / 1e6:.1f} MB in {found.seconds:.2f} s ({rate:.0f} MB/s)"
    )
    if found.torn:
        text += f"; a torn record at byte {found.torn[1]} of {found.torn[0].name}, which nobody was promised, was cut"
    return text


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
