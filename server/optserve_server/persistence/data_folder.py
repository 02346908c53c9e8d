"""The data folder: a lock, a journal, snapshots; and the recovery of all optimizers from them.

With durability `journal`, every change is on disk before it is made and acknowledged; from time to time a snapshot
replaces the older part of the journal. Recovery loads the last snapshot and makes the later changes once more, with the
same kernels, gradients and order: the same bits. With durability `snapshot` there are snapshots at intervals only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from optserve._common.clock import SYSTEM, Clock, Thread
from optserve_server.domain.errors import OptserveError, Reason, disk_errors
from optserve_server.engine import records
from optserve_server.engine.records import Change
from optserve_server.engine.registry import Optimizers
from optserve_server.persistence import recovery, snapshot
from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.folder_lock import UNCLEAN, FolderLock, set_unclean
from optserve_server.persistence.journal import Journal, JournalError, Reader, TornTail, segment_paths
from optserve_server.persistence.no_journal import NoJournal
from optserve_server.persistence.upkeep import Upkeep

logger = logging.getLogger(__name__)

_NOT_IN_PLACE = "the server's data folder was deleted, moved or replaced while it ran"

TICK_S = 1.0
"""Seconds between checks whether the folder is in place, and whether a snapshot is due."""

_SNAPSHOT_SOON = frozenset((records.CREATED, records.DELETED, records.REPLACED, records.PLACED))
"""Kinds of changes after which a snapshot is taken soon, if there is no journal."""


@dataclass
class Recovered:
    """The result of a recovery."""

    optimizers: int = 0
    snapshot_lsn: int = 0
    records: int = 0
    steps: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    torn_tail: TornTail | None = None


class DataFolder:
    """Durability by journal or by snapshots. It is given to the optimizers first, then `recover` fills and opens it.

    Args:
        path: The folder; made if it is not there.
        snapshot_bytes: Journal bytes after which a snapshot is due; never less than the state's own size.
        segment_bytes: Size of a journal segment.
        interval_s: Take snapshots so often, and keep no journal; 0 for a journal.
        clock: The time.
        disk: Where the folder is.

    Raises:
        JournalError: It cannot be used, or another server uses it.
    """

    reads_staging = True

    def __init__(
        self,
        path: Path,
        snapshot_bytes: int,
        segment_bytes: int,
        interval_s: float = 0.0,
        clock: Clock = SYSTEM,
        disk: Disk = SYSTEM_DISK,
    ) -> None:
        self._path = path
        self._disk = disk
        self._clock, self._monotonic = clock, clock.monotonic
        self._snapshot_bytes = snapshot_bytes
        self._segment_bytes = segment_bytes
        self._interval_s = interval_s
        self._journal: Journal | NoJournal | None = None
        # Of the journal: where the last snapshot left it, and what was read of it at the start.
        self._snapshot_lsn = 0
        self._bytes_at_snapshot = 0
        self._upkeep = Upkeep(clock)
        self._wake = clock.event()
        self._snapshot_requested = False
        self._stopping = clock.event()
        self._snapshotter: Thread | None = None
        self._is_in_place = True
        self._on_folder_checked: Callable[[bool], None] = lambda _in_place: None
        self._lock = FolderLock(path, disk)

    @property
    def problem(self) -> str:
        """Why changes cannot be made durable at the moment, in words; empty if they can."""
        return self._upkeep.problem if self._is_in_place else _NOT_IN_PLACE

    def check_in_place(self) -> None:
        """Raise NOT_DURABLE if the folder was deleted, moved or replaced."""
        if not self._lock.is_in_place:
            self._wake.set()
            raise OptserveError(Reason.NOT_DURABLE, f"Nothing was changed: {_NOT_IN_PLACE}. Restart the server.")

    # --- Durability

    def write(self, record: Change) -> int:
        """Write the record of a change, and return its number; with a journal, the record is on disk then.

        Raises:
            OptserveError: NOT_DURABLE, `in_doubt` where the disk keeps what it has refused.
        """
        if self._journal is None:
            raise OptserveError(Reason.DRAINING, "The data folder is not open.")
        self.check_in_place()
        kind, message, payload = record.encode()
        parts = [array.data.cast("B") for array in payload if array.size]
        with disk_errors():
            try:
                lsn = self._journal.append(kind, json.dumps(message).encode(), parts)
            except OSError as error:
                self._upkeep.refused(error)
                self._wake.set()
                self.remove_refused()
                raise
        if self._interval_s:
            if kind in _SNAPSHOT_SOON:
                self._snapshot_requested = True
                self._wake.set()
        else:
            self._upkeep.accepted()
            if self._has_grown() and self._upkeep.is_snapshot_due(grown=True):
                self._wake.set()
        return lsn

    def remove_refused(self) -> None:
        """Remove refused records that are still on disk; see Durability."""
        # Read once, because `close` sets it to None in another thread.
        journal = self._journal
        try:
            if journal is not None:
                journal.remove_refused()
        except OSError as error:
            raise OptserveError(
                Reason.NOT_DURABLE,
                f"The server's disk refused a change, and refuses to remove its record: {error.strerror or error}. If "
                "the server ends before the record is removed, the next start may make the change. Try again.",
                in_doubt="true",
            ) from error

    def _has_grown(self) -> bool:
        """Whether the journal has grown so much that a snapshot is due; all of its bytes count."""
        if self._journal is None:
            return False
        grown = self._journal.bytes_written - self._bytes_at_snapshot
        return grown > self._snapshot_bytes and grown > self._optimizers.memory_bytes

    # --- Recovery

    def recover(self, optimizers: Optimizers, on_progress: Callable[[int, int], None]) -> Recovered:
        """Recover all optimizers, and open the journal for new records.

        Args:
            optimizers: An empty registry, which is filled.
            on_progress: Called with (bytes read, bytes in all).

        Raises:
            JournalError: An acknowledged change cannot be read. Nothing was changed.
        """
        start = self._monotonic()
        found = Recovered()
        self._optimizers = optimizers
        try:
            snapshots = snapshot.paths(self._path)
            reader = self._replay(snapshots, found, on_progress)
            found.seconds = self._monotonic() - start
            self._snapshot_lsn, self._bytes_at_snapshot = found.snapshot_lsn, -reader.bytes_read
            self._open(reader)
            self._renew_lineages_if_unclean()
            for leftover in (*self._path.glob("*.tmp"), *snapshots[:-1]):
                if leftover.exists():
                    self._remove(leftover)
        except OSError as error:
            raise JournalError(f"The data folder {self._path} cannot be used: {error}.") from error
        return found

    def _replay(self, snapshots: list[Path], found: Recovered, on_progress: Callable[[int, int], None]) -> Reader:
        replay = recovery.Replay(self._optimizers)
        if snapshots:
            found.snapshot_lsn, saved = snapshot.read(snapshots[-1])
            for item in saved:
                replay.load(item)
        reader = Reader(self._path, found.snapshot_lsn)
        total = reader.total_bytes
        for record in reader:
            found.steps += record.kind == records.STEPPED
            found.records += 1
            try:
                replay.redo(record)
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{record.path}: the record at byte {record.offset} is whole, but means nothing to this server "
                    f"({error!r}). Use the server that wrote it, or a newer one."
                ) from error
            on_progress(reader.bytes_read, total)
        replay.finish()
        found.torn_tail, found.bytes_read, found.optimizers = reader.torn_tail, reader.bytes_read, len(self._optimizers)
        return reader

    def _open(self, reader: Reader) -> None:
        """Open the journal behind the last record that was read."""
        if self._interval_s:
            self._journal = NoJournal(self._path, reader.next_lsn, self._clock, self._disk)
            if segment_paths(self._path):
                self.snapshot()
        else:
            self._journal = Journal(self._path, reader.next_lsn, self._segment_bytes, self._clock, self._disk)

    def _renew_lineages_if_unclean(self) -> None:
        """Give every state a new lineage if steps may have been lost; clients that know those steps get an error."""
        if (self._path / UNCLEAN).exists():
            self._optimizers.renew_lineages()
            self.snapshot()
        # Without a journal, a crash loses steps from here on.
        set_unclean(self._path, unclean=bool(self._interval_s), disk=self._disk)

    # --- Snapshots

    def start_snapshots(self, on_folder_checked: Callable[[bool], None]) -> None:
        """Take snapshots in the background whenever one is due, and look after the folder.

        Args:
            on_folder_checked: Called with whether the folder is in place, when that changes.
        """
        self._on_folder_checked = on_folder_checked
        self._snapshotter = self._clock.thread(self._take_snapshots, "snapshots")
        self._snapshotter.start()

    def _take_snapshots(self) -> None:
        made_at = self._monotonic()
        while True:
            self._wake.wait(min(TICK_S, self._interval_s or TICK_S))
            # Cleared before `stopping` is read. `close` sets `stopping` first, so this thread cannot miss it.
            self._wake.clear()
            if self._stopping.is_set():
                return
            self._check_folder()
            with suppress(OptserveError):
                self.remove_refused()
            if not self._is_in_place or not self._has_changed() or not self._is_snapshot_due(made_at):
                continue
            self._snapshot_requested = False
            made_at = self._monotonic()
            try:
                self.snapshot()
            # Any error: this thread must go on, because without snapshots the journal would grow for ever.
            except Exception as error:  # noqa: BLE001
                self._upkeep.snapshot_failed(error)

    def _is_snapshot_due(self, last_at: float) -> bool:
        if self._interval_s:
            return self._snapshot_requested or self._monotonic() - last_at >= self._interval_s
        return self._upkeep.is_snapshot_due(grown=self._has_grown())

    def _has_changed(self) -> bool:
        """Whether there are changes that the last snapshot does not contain."""
        return self._journal is not None and self._journal.last_lsn != self._snapshot_lsn

    def _check_folder(self) -> None:
        in_place = self._lock.is_in_place
        if in_place == self._is_in_place:
            return
        self._is_in_place = in_place
        if in_place:
            logger.warning("the data folder %s is back; changes are accepted", self._path)
        else:
            logger.error("%s (%s); every change is refused until it is back", _NOT_IN_PLACE, self._path)
        self._on_folder_checked(in_place)

    def snapshot(self) -> Path:
        """Take a snapshot now, and remove the older snapshots and journal files."""
        if self._journal is None:
            raise JournalError("The data folder is not open.")
        start = self._monotonic()
        # Read first: bytes that are written meanwhile are counted twice, but never left out.
        before = self._journal.bytes_written
        lsn = self._journal.last_lsn
        old = snapshot.paths(self._path)
        path = snapshot.write(
            self._path, lsn, self._optimizers.settled(), still=bool(self._interval_s), disk=self._disk
        )
        for leftover in old:
            if leftover != path:
                self._remove(leftover)
        self._journal.delete_before(lsn + 1)
        self._snapshot_lsn, self._bytes_at_snapshot = lsn, before
        self._upkeep.snapshot_made(path.name, self._monotonic() - start)
        return path

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            self._disk.remove_tree(path)
        else:
            self._disk.unlink(path)

    def close(self, *, snapshot: bool = True) -> None:
        """Close the folder, by default with a last snapshot, so that the next start is quick."""
        self._stopping.set()
        self._wake.set()
        if self._snapshotter is not None:
            self._snapshotter.join()
        if self._journal is not None:
            if not self._lock.is_in_place:
                logger.error("%s (%s); nothing is written there", _NOT_IN_PLACE, self._path)
            elif snapshot:
                self._finish()
            self._journal.close()
            self._journal = None
        self._lock.release()

    def _finish(self) -> None:
        try:
            if self._has_changed():
                self.snapshot()
            set_unclean(self._path, unclean=False, disk=self._disk)
        # Stopping goes on; a journal has everything.
        except Exception:
            logger.exception("the last snapshot could not be written")


def describe(found: Recovered) -> str:
    """The result of a recovery as one line."""
    rate = found.bytes_read / max(found.seconds, 1e-9) / 1e6
    text = (
        f"recovered {found.optimizers} optimizers: snapshot at {found.snapshot_lsn}, then {found.records} records with "
        f"{found.steps} steps, {found.bytes_read / 1e6:.1f} MB in {found.seconds:.2f} s ({rate:.0f} MB/s)"
    )
    if found.torn_tail:
        text += (
            f"; the torn record at byte {found.torn_tail.offset} of {found.torn_tail.path.name} was never acknowledged "
            "and is ignored"
        )
    return text
