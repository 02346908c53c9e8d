"""The data folder: a lock, a journal and snapshots, and the recovery of all optimizers from them.

With durability `journal`, the record of each change is on disk before the change is made and acknowledged. From time
to time a snapshot replaces the older part of the journal. Recovery loads the last snapshot and makes the later changes
once more, in the same order, with the same kernels and gradients, so it gets the same bits. With durability `snapshot`
there is no journal, and a snapshot is written at intervals.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from optserve._common.clock import SYSTEM, Clock, Thread
from optserve_server.domain.errors import OptserveError, Reason, disk_errors
from optserve_server.engine.record_encoding import ADDED, CREATED, DELETED, PLACED, REPLACED, STEPPED
from optserve_server.engine.records import Change
from optserve_server.engine.registry import Optimizers
from optserve_server.persistence import recovery, snapshot
from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.folder_lock import UNCLEAN, FolderLock, set_unclean
from optserve_server.persistence.journal import Journal, JournalError, Reader, segment_paths
from optserve_server.persistence.no_journal import NoJournal
from optserve_server.persistence.recovery import RecoveryResult
from optserve_server.persistence.upkeep import Upkeep

logger = logging.getLogger(__name__)

_NOT_IN_PLACE = "the server's data folder was deleted, moved or replaced while it ran"

TICK_S = 1.0
"""Seconds between checks whether the folder is in place, and whether a snapshot is due."""

_KINDS_THAT_NEED_A_SNAPSHOT = frozenset((CREATED, DELETED, REPLACED, PLACED, ADDED))
"""Without a journal: the kinds of changes after which a snapshot is written at once."""


class DataFolder:
    """Durability by journal or by snapshots.

    Make it, give it to a registry of optimizers, then call `recover`, which fills the registry and opens the journal.

    Args:
        path: The folder; created if it does not exist.
        snapshot_bytes: A snapshot is due when the journal has grown by so many bytes, and by the size of the state.
        segment_bytes: Size of a journal segment.
        interval_s: Seconds between snapshots, without a journal; 0 for a journal.
        clock: The time.
        disk: The disk of the folder.

    Raises:
        JournalError: The folder cannot be used, or another server uses it.
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
        self._snapshot_lsn = 0
        # `Journal.bytes_written` at the last snapshot. Negative after a start: bytes that were read count as written.
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
        """Why changes cannot be made durable now, in words; empty if they can."""
        return self._upkeep.problem if self._is_in_place else _NOT_IN_PLACE

    def check_in_place(self) -> None:
        """Raise NOT_DURABLE if the folder was deleted, moved or replaced."""
        if not self._lock.is_in_place:
            self._wake.set()
            raise OptserveError(Reason.NOT_DURABLE, f"Nothing was changed: {_NOT_IN_PLACE}. Restart the server.")

    # --- Durability

    def write(self, record: Change) -> int:
        """Write the record of a change, and return its LSN. With a journal, the record is on disk then.

        Raises:
            OptserveError: NOT_DURABLE, with `in_doubt` if the disk refuses to remove the refused record; DRAINING.
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
            if kind in _KINDS_THAT_NEED_A_SNAPSHOT:
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
        """Whether the journal has grown by so many bytes that a snapshot is due."""
        if self._journal is None:
            return False
        grown = self._journal.bytes_written - self._bytes_at_snapshot
        return grown > self._snapshot_bytes and grown > self._optimizers.memory_bytes

    # --- Recovery

    def recover(self, optimizers: Optimizers, on_progress: Callable[[int, int], None]) -> RecoveryResult:
        """Recover all optimizers, and open the journal for new records.

        Args:
            optimizers: An empty registry, to which the optimizers are added.
            on_progress: Called with (bytes read, bytes of the journal) after each record.

        Raises:
            JournalError: An acknowledged change cannot be read. The folder is unchanged.
        """
        start = self._monotonic()
        result = RecoveryResult()
        self._optimizers = optimizers
        try:
            snapshots = snapshot.paths(self._path)
            reader = self._replay(snapshots, result, on_progress)
            result.seconds = self._monotonic() - start
            self._snapshot_lsn, self._bytes_at_snapshot = result.snapshot_lsn, -reader.bytes_read
            self._open(reader)
            self._renew_lineages_if_unclean()
            for leftover in (*self._path.glob("*.tmp"), *snapshots[:-1]):
                if leftover.exists():
                    self._remove(leftover)
        except OSError as error:
            raise JournalError(f"The data folder {self._path} cannot be used: {error}.") from error
        return result

    def _replay(self, snapshots: list[Path], result: RecoveryResult, on_progress: Callable[[int, int], None]) -> Reader:
        replay = recovery.Replay(self._optimizers)
        if snapshots:
            result.snapshot_lsn, saved = snapshot.read(snapshots[-1])
            for saved_optimizer in saved:
                replay.load(saved_optimizer)
        reader = Reader(self._path, result.snapshot_lsn)
        total = reader.total_bytes
        for record in reader:
            result.steps += record.kind == STEPPED
            result.records += 1
            try:
                replay.redo(record)
            except (OptserveError, ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{record.path}: the record at byte {record.offset} is undamaged, but this server cannot read it "
                    f"({error!r}). Use the server that wrote it, or a newer one."
                ) from error
            on_progress(reader.bytes_read, total)
        replay.finish()
        result.torn_tail, result.bytes_read = reader.torn_tail, reader.bytes_read
        result.optimizers = len(self._optimizers)
        return reader

    def _open(self, reader: Reader) -> None:
        """Open the journal for writing after the last record that was read."""
        if self._interval_s:
            self._journal = NoJournal(self._path, reader.next_lsn, self._clock, self._disk)
            if segment_paths(self._path):
                self.snapshot()
        else:
            self._journal = Journal(self._path, reader.next_lsn, self._segment_bytes, self._clock, self._disk)

    def _renew_lineages_if_unclean(self) -> None:
        """Give every state a new lineage if steps may have been lost, so that clients of those steps get an error."""
        if (self._path / UNCLEAN).exists():
            self._optimizers.renew_lineages()
            self.snapshot()
        # From now on a crash loses steps if there is no journal.
        set_unclean(self._path, unclean=bool(self._interval_s), disk=self._disk)

    # --- Snapshots

    def start_snapshots(self, on_folder_checked: Callable[[bool], None]) -> None:
        """Start the thread that writes snapshots when they are due, and checks that the folder is in place.

        Args:
            on_folder_checked: Called with True if the folder is in place, else False, each time that changes.
        """
        self._on_folder_checked = on_folder_checked
        self._snapshotter = self._clock.thread(self._take_snapshots, "snapshots")
        self._snapshotter.start()

    def _take_snapshots(self) -> None:
        last_at = self._monotonic()
        while True:
            self._wake.wait(min(TICK_S, self._interval_s or TICK_S))
            # Cleared before `stopping` is read. `close` sets `stopping` first, so this thread cannot miss it.
            self._wake.clear()
            if self._stopping.is_set():
                return
            self._check_folder()
            with suppress(OptserveError):
                self.remove_refused()
            if not self._is_in_place or not self._has_changed() or not self._is_snapshot_due(last_at):
                continue
            self._snapshot_requested = False
            last_at = self._monotonic()
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
            logger.warning("the data folder %s is in place again; changes are accepted", self._path)
        else:
            logger.error("%s (%s); every change is refused until it is in place again", _NOT_IN_PLACE, self._path)
        self._on_folder_checked(in_place)

    def snapshot(self) -> Path:
        """Write a snapshot now, and remove the older snapshots and journal segments.

        Returns:
            The folder of the snapshot.

        Raises:
            JournalError: The data folder is not open.
            OSError: The disk refuses the snapshot.
            OptserveError: STATE_LOST.
        """
        if self._journal is None:
            raise JournalError("The data folder is not open.")
        start = self._monotonic()
        # Read before the snapshot, so that bytes that are written during it count for the next one.
        before = self._journal.bytes_written
        lsn = self._journal.last_lsn
        old = snapshot.paths(self._path)
        path = snapshot.write(
            self._path, lsn, self._optimizers.settled(), keep_locked=bool(self._interval_s), disk=self._disk
        )
        for leftover in old:
            if leftover != path:
                self._remove(leftover)
        self._journal.delete_before(lsn + 1)
        self._snapshot_lsn, self._bytes_at_snapshot = lsn, before
        self._upkeep.snapshot_written(path.name, self._monotonic() - start)
        return path

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            self._disk.remove_tree(path)
        else:
            self._disk.unlink(path)

    def close(self, *, snapshot: bool = True) -> None:
        """Close the folder.

        Args:
            snapshot: Write a last snapshot, so that the next start is fast.
        """
        self._stopping.set()
        self._wake.set()
        if self._snapshotter is not None:
            self._snapshotter.join()
        if self._journal is not None:
            if not self._lock.is_in_place:
                logger.error("%s (%s); nothing is written to it", _NOT_IN_PLACE, self._path)
            elif snapshot:
                self._write_last_snapshot()
            self._journal.close()
            self._journal = None
        self._lock.release()

    def _write_last_snapshot(self) -> None:
        try:
            if self._has_changed():
                self.snapshot()
            set_unclean(self._path, unclean=False, disk=self._disk)
        # Any error: the server must stop. If there is a journal, it contains every change.
        except Exception:
            logger.exception("the last snapshot could not be written")
