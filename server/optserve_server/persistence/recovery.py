"""Recovers optimizers from a snapshot and the journal.

Decides which records to replay, and in which stretches of the arenas. `engine/transition.py` makes the changes.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import numpy as np

from optserve_server.engine import records, transition
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.record_encoding import CREATED, optimizer_of
from optserve_server.engine.records import (
    AdditionRecord,
    CreationRecord,
    DeletionRecord,
    PlacementRecord,
    ReplacementRecord,
    UpdateRecord,
)
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.step_record import StepRecord
from optserve_server.engine.transaction import Retained
from optserve_server.engine.transition import Replacement, Room
from optserve_server.numerics.layout import ALL, Run, Selection
from optserve_server.numerics.preparation import Prepared
from optserve_server.persistence import snapshot
from optserve_server.persistence.journal import Record, TornTail


@dataclass
class RecoveryResult:
    """The result of a recovery.

    Attributes:
        optimizers: Number of optimizers.
        snapshot_lsn: LSN of the snapshot; 0 if there is none.
        records: Number of records that were read after the snapshot.
        steps: Number of steps among them.
        bytes_read: Bytes of records.
        seconds: Duration of the recovery.
        torn_tail: The torn tail of the journal, if it has one.
    """

    optimizers: int = 0
    snapshot_lsn: int = 0
    records: int = 0
    steps: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    torn_tail: TornTail | None = None

    @property
    def summary(self) -> str:
        """The result as one line of the log."""
        rate = self.bytes_read / max(self.seconds, 1e-9) / 1e6
        text = (
            f"recovered {self.optimizers} optimizers: snapshot at {self.snapshot_lsn}, then {self.records} records "
            f"with {self.steps} steps, {self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s ({rate:.0f} MB/s)"
        )
        if self.torn_tail:
            path, offset = self.torn_tail
            text += f"; the torn record at byte {offset} of {path.name} was never acknowledged and is ignored"
        return text


@dataclass
class _ArenaPieces:
    """The pieces of one arena in a snapshot, sorted, with their first elements for bisection."""

    starts: list[int] = field(default_factory=list)
    pieces: list[snapshot.Piece] = field(default_factory=list)


class Replay:
    """Makes the changes of the journal once more, record by record.

    Each piece of a snapshot has the LSN of the last change that it contains. Only later changes are made in the piece.

    Args:
        optimizers: An empty registry. `load` and `redo` fill it.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._pieces: dict[str, list[snapshot.Piece]] = {}
        # The same pieces by name of the optimizer and name of the dtype.
        self._arenas: dict[str, dict[str, _ArenaPieces]] = {}
        # By name of the optimizer: the LSN of its description in the snapshot, which was written before its pieces; the
        # highest LSN of a piece; and the LSN of the last step in the journal.
        self._described_lsn: dict[str, int] = {}
        self._newest_piece_lsn: dict[str, int] = {}
        self._last_step_lsn: dict[str, int] = {}

    def load(self, saved: snapshot.SavedOptimizer) -> None:
        """Load an optimizer of the snapshot.

        Raises:
            JournalError: Its file is damaged, or this server does not know one of its settings.
        """
        header = saved.header
        record = CreationRecord(
            header["id"], saved.layout, saved.settings, header["etag"], header["lineage"],
            header["creation_request_id"], saved.time("create_time"),
        )  # fmt: skip
        optimizer = self._optimizers.adopt(record, header["created_lsn"])
        optimizer.steps.update_time = saved.time("update_time")
        optimizer.replacements.extend(
            map(Replacement, header["replacement_request_ids"], header.get("targets", repeat("")))
        )
        optimizer.steps.step, optimizer.steps.lsn = header["step"], header["lsn"]
        optimizer.steps.placed_by, optimizer.steps.layout_lsn = header.get("placed_by"), header.get("layout_lsn", 0)
        optimizer.steps.workers.registry.from_json(header.get("workers", {}))
        if header["retained"]:
            retained = header["retained"]
            optimizer.steps.main.retained = Retained(
                retained["request_id"],
                retained["step"],
                Selection(tuple(retained["tensors"])).normalized(optimizer.layout),
                retained["intact"],
            )
        with optimizer.steps.locked_state() as state:
            state.set_parameter_steps(header.get("parameter_steps"), header["step"])
            saved.load(state, optimizer.steps.main.staging)
        self._described_lsn[optimizer.id] = header["lsn"]
        self._pieces[optimizer.id] = saved.pieces
        self._arenas[optimizer.id] = _by_arena(saved.pieces)
        self._newest_piece_lsn[optimizer.id] = max((piece.lsn for piece in saved.pieces), default=0)

    def redo(self, entry: Record) -> None:
        """Make a change of the journal once more, in the stretches that do not contain it yet.

        Raises:
            ValueError, KeyError or TypeError: The record is not valid.
        """
        message, lsn = json.loads(entry.meta), entry.lsn
        optimizer = self._optimizers.find(optimizer_of(message))
        if optimizer is None:
            if entry.kind == CREATED:
                self._optimizers.adopt(CreationRecord.decode(message), lsn)
            return
        if lsn <= optimizer.created_lsn:
            # The record is of an earlier optimizer of that name, which was deleted.
            return
        if lsn <= self._described_lsn.get(optimizer.id, 0):
            # All pieces of the snapshot were written after this change. It may not be readable any more: a step may be
            # of fewer parameters, or have settings for a group that was removed since.
            return
        record = records.decode(entry.kind, message, entry.payload, optimizer.steps.payloads)
        with optimizer.steps.locked_state():
            match record:
                case StepRecord():
                    self._step(optimizer, record, lsn)
                case ReplacementRecord():
                    self._replace(optimizer, record, lsn)
                case PlacementRecord():
                    self._place(optimizer, record, lsn)
                case AdditionRecord():
                    self._add(optimizer, record, lsn)
                case CreationRecord() if lsn > optimizer.steps.lsn:
                    self._optimizers.adopt(record, lsn)
                case UpdateRecord() if lsn > optimizer.steps.lsn:
                    transition.note_update(optimizer.steps, record, lsn)
                case DeletionRecord() if lsn > optimizer.steps.lsn:
                    self._forget(optimizer.id)
                case None:
                    raise ValueError(f"kind {entry.kind} is unknown")

    def _forget(self, name: str) -> None:
        self._optimizers.forget(name)
        self._described_lsn.pop(name, None)
        self._pieces.pop(name, None)
        self._arenas.pop(name, None)
        self._newest_piece_lsn.pop(name, None)

    def _step(self, optimizer: Optimizer, record: StepRecord, lsn: int) -> None:
        payload = optimizer.steps.payloads.payload_for(record.selection, None)
        operands, runs = optimizer.steps.main.staging.operands, payload.runs
        gradients = [
            record.operands[begin : begin + len(runs)] for begin in range(0, len(record.operands), max(len(runs), 1))
        ]
        runs_to_redo: list[Run] = []
        parts: list[tuple[int, int, int]] = []
        for run_number, run in enumerate(runs):
            for start, stop in self._stretches_without(optimizer.id, lsn, run.dtype, run.start, run.stop):
                runs_to_redo.append(Run(0, 0, run.dtype, run.wire, start, stop))
                parts.append((run_number, start - run.start, stop - run.start))
        for arenas, arrays in zip(operands.values(), gradients, strict=bool(runs)):
            for run, (run_number, first, end) in zip(runs_to_redo, parts, strict=True):
                arenas[run.dtype][run.start : run.stop] = arrays[run_number][first:end]
        # Clipping needs the norm of the whole gradient, even if only some stretches are made once more.
        clip = optimizer.state.measure(payload, gradients[0] if gradients else ())
        prepared = Prepared(clip.for_parts(parts) if clip else None, covered=False)
        transition.apply_step(optimizer.state, operands, runs_to_redo, record, prepared)
        if lsn > optimizer.steps.lsn:
            transition.note_step(optimizer.steps, record, payload.selection, lsn)
        self._last_step_lsn[optimizer.id] = lsn

    def _place(self, optimizer: Optimizer, record: PlacementRecord, lsn: int) -> None:
        runs = optimizer.steps.payloads.payload_for(ALL, None).runs
        transition.apply_placement(optimizer.state, runs, record, partial(self._stretches_without, optimizer.id, lsn))
        if lsn > optimizer.steps.lsn:
            transition.note_placement(optimizer.steps, record, lsn)

    def _add(self, optimizer: Optimizer, record: AdditionRecord, lsn: int) -> None:
        """Make an addition once more. The pieces of the snapshot are of the parameters before."""
        before, present = optimizer.layout.sizes, optimizer.state
        room = Room.of(optimizer.layout.with_added(record.added), record.settings, present.backend)
        transition.apply_addition(optimizer.steps, record, room)
        transition.note_addition(optimizer.steps, record, lsn)
        if optimizer.id not in self._pieces:
            return
        # The new parts of the arenas contain the changes up to this one. The last reply has no part there.
        added = [
            snapshot.Piece(dtype.name, start, optimizer.layout.sizes[dtype], lsn, True, [])
            for dtype, start in before.items()
            if start < optimizer.layout.sizes[dtype]
        ]
        self._pieces[optimizer.id] += added
        self._arenas[optimizer.id] = _by_arena(self._pieces[optimizer.id])

    def _replace(self, optimizer: Optimizer, record: ReplacementRecord, lsn: int) -> None:
        transition.apply_replacement(optimizer.state, record, partial(self._stretches_without, optimizer.id, lsn))
        if lsn > optimizer.steps.lsn:
            transition.note_replacement(optimizer.steps, record, lsn)

    def _stretches_without(self, name: str, lsn: int, dtype: np.dtype, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of a part of an arena that do not contain the change with that LSN yet."""
        if lsn > self._newest_piece_lsn.get(name, 0):
            return [(start, stop)]
        arena = self._arenas[name].get(dtype.name, _ArenaPieces())
        stretches = []
        # Finds the piece of `start` by bisection, because there may be as many runs and pieces as parameters.
        for position in range(max(0, bisect.bisect_right(arena.starts, start) - 1), len(arena.pieces)):
            piece = arena.pieces[position]
            if piece.start >= stop:
                break
            if piece.lsn < lsn and max(start, piece.start) < min(stop, piece.stop):
                stretches.append((max(start, piece.start), min(stop, piece.stop)))
        return stretches

    def finish(self) -> None:
        """Decide which replies are intact: each of their pieces was intact in the snapshot, or was made once more."""
        for name, pieces in self._pieces.items():
            optimizer = self._optimizers.find(name)
            if optimizer is not None and optimizer.steps.main.retained is not None:
                last = self._last_step_lsn.get(name, 0)
                optimizer.steps.main.retained.intact &= all(piece.intact for piece in pieces if piece.lsn >= last)


def _by_arena(pieces: list[snapshot.Piece]) -> dict[str, _ArenaPieces]:
    """The pieces of each arena, by name of the dtype."""
    arenas: dict[str, _ArenaPieces] = {}
    for piece in sorted(pieces, key=lambda piece: piece.start):
        arena = arenas.setdefault(piece.dtype, _ArenaPieces())
        arena.starts.append(piece.start)
        arena.pieces.append(piece)
    return arenas
