"""The data folder: a lock, a journal, snapshots; and the recovery of all optimizers from them.

Every change is in the journal, on disk, before it is made and acknowledged. From time to time a snapshot takes the
place of what came before it. Recovery loads the last snapshot and replays the journal: the same kernels on the same
gradients in the same order, so the same bits.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from optserve_server import snapshot
from optserve_server.durability import CreationRecord, StepRecord
from optserve_server.errors import OptserveError, Reason
from optserve_server.journal import Journal, JournalError, Reader, Record
from optserve_server.layout import Payload, Run
from optserve_server.optimizers import Optimizer, Optimizers
from optserve_server.rules import Rule
from optserve_server.steps import Retained

logger = logging.getLogger(__name__)

CREATED, UPDATED, DELETED, STEPPED = 1, 2, 3, 4
"""Record types of the journal."""


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


class DataFolder:
    """Durability by journal. Made in two parts: it is given to the optimizers, then `recover` fills and opens it.

    Args:
        path: The folder; made if it is not there.
        snapshot_bytes: Journal bytes after which a snapshot is due; never less than the state's own size.
        segment_bytes: Size of a journal segment.

    Raises:
        JournalError: It cannot be used, or another server uses it.
    """

    name = "journal"

    def __init__(self, path: Path, snapshot_bytes: int, segment_bytes: int) -> None:
        self._path = path
        self._snapshot_bytes = snapshot_bytes
        self._segment_bytes = segment_bytes
        self._journal: Journal | None = None
        self._bytes_since_snapshot = 0
        self._snapshot_due = threading.Event()
        self._stopping = threading.Event()
        self._snapshotter: threading.Thread | None = None
        self._lock = FolderLock(path)

    # --- Durability

    def created(self, record: CreationRecord) -> int:
        """Keep a creation."""
        message = {
            "optimizer": record.optimizer,
            "rule": snapshot.rule_message(record.rule),
            "parameters": snapshot.layout_message(record.layout),
            "etag": record.etag,
            "request_id": record.request_id,
            "time": record.create_time.isoformat(),
        }
        return self._append(CREATED, message)

    def updated(self, optimizer: str, rule: Rule, etag: str) -> int:
        """Keep a change of hyper-parameters."""
        message = {
            "optimizer": optimizer,
            "rule": snapshot.rule_message(rule),
            "etag": etag,
            "time": datetime.now(UTC).isoformat(),
        }
        return self._append(UPDATED, message)

    def deleted(self, optimizer: str) -> int:
        """Keep a deletion."""
        return self._append(DELETED, {"optimizer": optimizer})

    def stepping(self, record: StepRecord) -> int:
        """Keep the gradients of a step."""
        message = {"optimizer": record.optimizer, "step": record.step, "request_id": record.request_id}
        return self._append(STEPPED, message | {"tensors": record.tensors}, record.gradients)

    def _append(self, kind: int, message: dict[str, Any], payload: Sequence[np.ndarray] = ()) -> int:
        if self._journal is None:
            raise OptserveError(Reason.DRAINING, "The data folder is not open.")
        parts = [array.data.cast("B") for array in payload if array.size]
        try:
            lsn = self._journal.append(kind, json.dumps(message).encode(), parts)
        except OSError as error:
            logger.error("a change of %s could not be made durable: %s", message["optimizer"], error)  # noqa: TRY400
            raise OptserveError(
                Reason.NOT_DURABLE,
                f"The server's disk did not take the change, so it was not made: {error.strerror or error}. "
                "Try again when it has room.",
            ) from error
        self._bytes_since_snapshot += sum(len(part) for part in parts)
        if self._bytes_since_snapshot > max(self._snapshot_bytes, self._optimizers.memory_bytes):
            self._snapshot_due.set()
        return lsn

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
        replay = _Replay(optimizers)
        snapshots = snapshot.paths(self._path)
        if snapshots:
            found.snapshot_lsn, saved = snapshot.read(snapshots[-1])
            for item in saved:
                replay.load(item)
        reader = Reader(self._path, found.snapshot_lsn)
        total = reader.total_bytes
        for record in reader:
            found.steps += record.type == STEPPED
            found.records += 1
            replay.redo(record)
            on_progress(reader.bytes_read, total)
        replay.finish()
        found.torn, found.bytes_read, found.optimizers = reader.torn, reader.bytes_read, len(optimizers)
        found.seconds = time.perf_counter() - start
        self._journal = Journal(self._path, reader.next_lsn, self._segment_bytes)
        self._bytes_since_snapshot = reader.bytes_read
        self._optimizers = optimizers
        for leftover in [*self._path.glob("*.tmp"), *snapshots[:-1]]:
            _remove(leftover)
        return found

    # --- Snapshots

    def start_snapshots(self) -> None:
        """Take snapshots in the background whenever one is due."""
        self._snapshotter = threading.Thread(target=self._take_snapshots, name="snapshots", daemon=True)
        self._snapshotter.start()

    def _take_snapshots(self) -> None:
        while True:
            self._snapshot_due.wait()
            # Cleared before the look at `stopping`, which `close` sets first: neither can be missed.
            self._snapshot_due.clear()
            if self._stopping.is_set():
                return
            try:
                self.snapshot()
            except OSError:
                # The journal has everything; the next record beyond the limit asks for a snapshot again.
                logger.exception("a snapshot could not be written")

    def snapshot(self) -> Path:
        """Take a snapshot now, and cut what it makes superfluous."""
        if self._journal is None:
            raise JournalError("The data folder is not open.")
        lsn, before = self._journal.last_lsn, self._bytes_since_snapshot
        old = snapshot.paths(self._path)
        path = snapshot.write(self._path, lsn, self._optimizers.settled())
        for leftover in old:
            if leftover != path:
                _remove(leftover)
        self._journal.cut_before(lsn + 1)
        self._bytes_since_snapshot -= before
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
            except OSError:
                logger.exception("the last snapshot could not be written; the journal has everything")
            self._journal.close()
            self._journal = None
        self._lock.release()


class _Replay:
    """Brings optimizers forward, record by record; pieces of a snapshot each from their own number on."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._pieces: dict[str, list[snapshot.Piece]] = {}
        self._newest_piece: dict[str, int] = {}
        self._last_step: dict[str, int] = {}

    def load(self, saved: snapshot.Saved) -> None:
        """Bring an optimizer of the snapshot back."""
        settings = saved.settings
        record = CreationRecord(
            settings["id"], saved.layout, saved.rule, settings["etag"], settings["creation_request_id"],
            saved.time("create_time"),
        )  # fmt: skip
        item = self._optimizers.adopt(record)
        item.update_time = saved.time("update_time")
        item.steps.step, item.steps.lsn = settings["step"], settings["lsn"]
        if settings["retained"]:
            retained = settings["retained"]
            item.steps.retained = Retained(**retained | {"tensors": tuple(retained["tensors"])})
        with item.steps.held_still() as state:
            saved.load(state)
        self._pieces[item.id] = saved.pieces
        self._newest_piece[item.id] = max((piece.lsn for piece in saved.pieces), default=0)

    def redo(self, record: Record) -> None:
        """Make a change of the journal once more, as far as it is not contained in what was loaded."""
        message = json.loads(record.meta)
        name = message["optimizer"]
        item = self._optimizers.find(name)
        known = item is not None and record.lsn <= item.steps.lsn
        if record.type == CREATED and not known:
            self._create(message, record.lsn)
        elif record.type == STEPPED and item is not None:
            self._step(item, message, record)
        elif record.type == UPDATED and item is not None and not known:
            item.state.set_rule(snapshot.rule_from(message["rule"]))
            item.etag, item.update_time = message["etag"], datetime.fromisoformat(message["time"])
            item.steps.lsn = record.lsn
        elif record.type == DELETED and not known:
            self._optimizers.forget(name)
            self._pieces.pop(name, None)
            self._newest_piece.pop(name, None)

    def _create(self, message: dict[str, Any], lsn: int) -> None:
        created = CreationRecord(
            message["optimizer"],
            snapshot.layout_from(message["parameters"]),
            snapshot.rule_from(message["rule"]),
            message["etag"],
            message["request_id"],
            datetime.fromisoformat(message["time"]),
        )
        self._optimizers.adopt(created).steps.lsn = lsn

    def _step(self, item: Optimizer, message: dict[str, Any], record: Record) -> None:
        tensors = tuple(message["tensors"]) or tuple(range(len(item.layout.parameters)))
        payload = Payload(item.layout, tensors)
        with item.steps.held_still() as state:
            behind: list[Run] = []
            for run in payload.runs:
                gradient = np.frombuffer(record.payload[run.begin : run.end], run.dtype)
                for start, stop in self._behind(item.id, run, record.lsn):
                    state.staged[run.dtype][start:stop] = gradient[start - run.start : stop - run.start]
                    behind.append(Run(0, 0, run.dtype, run.wire, start, stop))
            state.apply(behind)
        if record.lsn > item.steps.lsn:
            item.steps.lsn, item.steps.step = record.lsn, message["step"] + 1
            item.steps.retained = Retained(message["request_id"], item.steps.step, payload.tensors)
        self._last_step[item.id] = record.lsn

    def _behind(self, name: str, run: Run, lsn: int) -> list[tuple[int, int]]:
        """The stretches of a run that do not contain the change `lsn` yet."""
        if lsn > self._newest_piece.get(name, 0):
            return [(run.start, run.stop)]
        stretches = [
            (max(run.start, piece.start), min(run.stop, piece.stop))
            for piece in self._pieces[name]
            if piece.dtype == run.dtype.name and piece.lsn < lsn
        ]
        return [(start, stop) for start, stop in stretches if start < stop]

    def finish(self) -> None:
        """A reply is intact if each of its pieces was, where the piece was not computed anew."""
        for name, pieces in self._pieces.items():
            item = self._optimizers.find(name)
            if item is not None and item.steps.retained is not None:
                last = self._last_step.get(name, 0)
                item.steps.retained.intact &= all(piece.intact for piece in pieces if piece.lsn >= last)


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
