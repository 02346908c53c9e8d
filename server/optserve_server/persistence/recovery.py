"""Recovers optimizers from a snapshot and the journal: decides which changes to make once more, and in which stretches.

`engine/transition.py` makes the changes.
"""

from __future__ import annotations

import bisect
import json
from functools import partial
from itertools import repeat

import numpy as np

from optserve_server.engine import records, transition
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.records import (
    CreationRecord,
    DeletionRecord,
    PlacementRecord,
    ReplacementRecord,
    StepRecord,
    UpdateRecord,
)
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import Retained
from optserve_server.engine.transition import Replacement
from optserve_server.numerics.layout import ALL, Run, Selection
from optserve_server.numerics.state import Prepared
from optserve_server.persistence import snapshot
from optserve_server.persistence.journal import Record


class Replay:
    """Makes the changes of the journal once more, record by record.

    Each piece of a snapshot has the number of the last change that it contains; only later changes are made in it.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._pieces: dict[str, list[snapshot.Piece]] = {}
        # The same pieces by optimizer and dtype, sorted, with their first elements for bisection.
        self._arenas: dict[str, dict[str, tuple[list[int], list[snapshot.Piece]]]] = {}
        self._newest_piece: dict[str, int] = {}
        self._last_step: dict[str, int] = {}

    def load(self, saved: snapshot.Saved) -> None:
        """Load an optimizer of the snapshot."""
        header = saved.header
        record = CreationRecord(
            header["id"], saved.layout, saved.settings, header["etag"], header["lineage"],
            header["creation_request_id"], saved.time("create_time"),
        )  # fmt: skip
        item = self._optimizers.adopt(record, header["created_lsn"])
        item.steps.update_time = saved.time("update_time")
        item.replacements.extend(map(Replacement, header["replacement_request_ids"], header.get("targets", repeat(""))))
        item.steps.step, item.steps.lsn = header["step"], header["lsn"]
        item.steps.placed_by = header.get("placed_by")
        item.steps.workers.registry.from_json(header.get("workers", {}))
        if header["retained"]:
            retained = header["retained"]
            item.steps.main.retained = Retained(
                retained["request_id"],
                retained["step"],
                Selection(tuple(retained["tensors"])).normalized(item.layout),
                retained["intact"],
            )
        with item.steps.held_still() as state:
            state.set_parameter_steps(header.get("parameter_steps"), header["step"])
            saved.load(state, item.steps.main.staging)
        self._pieces[item.id] = saved.pieces
        self._arenas[item.id] = _by_arena(saved.pieces)
        self._newest_piece[item.id] = max((piece.lsn for piece in saved.pieces), default=0)

    def redo(self, entry: Record) -> None:
        """Make a change of the journal once more, in the stretches that do not contain it yet."""
        message, lsn = json.loads(entry.meta), entry.lsn
        item = self._optimizers.find(message["optimizer"])
        if item is None:
            if entry.kind == records.CREATED:
                self._optimizers.adopt(CreationRecord.decode(message), lsn)
            return
        if lsn <= item.created_lsn:
            # The record belongs to an earlier optimizer of that name.
            return
        record = records.decode(entry.kind, message, entry.payload, item.steps.payloads)
        with item.steps.held_still():
            match record:
                case StepRecord():
                    self._step(item, record, lsn)
                case ReplacementRecord():
                    self._replace(item, record, lsn)
                case PlacementRecord():
                    self._place(item, record, lsn)
                case CreationRecord() if lsn > item.steps.lsn:
                    self._optimizers.adopt(record, lsn)
                case UpdateRecord() if lsn > item.steps.lsn:
                    transition.note_update(item.steps, record, lsn)
                case DeletionRecord() if lsn > item.steps.lsn:
                    self._forget(item.id)

    def _forget(self, name: str) -> None:
        self._optimizers.forget(name)
        self._pieces.pop(name, None)
        self._arenas.pop(name, None)
        self._newest_piece.pop(name, None)

    def _step(self, item: Optimizer, record: StepRecord, lsn: int) -> None:
        payload = item.steps.payloads.payload_for(record.selection, None)
        operands, runs = item.steps.main.staging.operands, payload.runs
        gradients = [
            record.operands[begin : begin + len(runs)] for begin in range(0, len(record.operands), max(len(runs), 1))
        ]
        runs_to_redo: list[Run] = []
        parts: list[tuple[int, int, int]] = []
        for run_number, run in enumerate(runs):
            for start, stop in self._stretches_without(item.id, lsn, run.dtype, run.start, run.stop):
                runs_to_redo.append(Run(0, 0, run.dtype, run.wire, start, stop))
                parts.append((run_number, start - run.start, stop - run.start))
        for arenas, arrays in zip(operands.values(), gradients, strict=bool(runs)):
            for run, (run_number, first, end) in zip(runs_to_redo, parts, strict=True):
                arenas[run.dtype][run.start : run.stop] = arrays[run_number][first:end]
        # Clipping needs the norm of the whole step, also if only some stretches have to be redone.
        clip = item.state.measure(payload, gradients[0] if gradients else ())
        prepared = Prepared(clip.for_parts(parts) if clip else None, covered=False)
        transition.apply_step(item.state, operands, runs_to_redo, record, prepared)
        if lsn > item.steps.lsn:
            transition.note_step(item.steps, record, payload.selection, lsn)
        self._last_step[item.id] = lsn

    def _place(self, item: Optimizer, record: PlacementRecord, lsn: int) -> None:
        runs = item.steps.payloads.payload_for(ALL, None).runs
        transition.apply_placement(item.state, runs, record, partial(self._stretches_without, item.id, lsn))
        if lsn > item.steps.lsn:
            transition.note_placement(item.steps, record, lsn)

    def _replace(self, item: Optimizer, record: ReplacementRecord, lsn: int) -> None:
        transition.apply_replacement(item.state, record, partial(self._stretches_without, item.id, lsn))
        if lsn > item.steps.lsn:
            transition.note_replacement(item.steps, record, lsn)

    def _stretches_without(self, name: str, lsn: int, dtype: np.dtype, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of a part of an arena that do not contain the change `lsn` yet."""
        if lsn > self._newest_piece.get(name, 0):
            return [(start, stop)]
        starts, pieces = self._arenas[name].get(dtype.name, ([], []))
        stretches = []
        # Begins at the piece of `start`, by bisection: there may be as many runs and pieces as parameters.
        for position in range(max(0, bisect.bisect_right(starts, start) - 1), len(pieces)):
            piece = pieces[position]
            if piece.start >= stop:
                break
            if piece.lsn < lsn and max(start, piece.start) < min(stop, piece.stop):
                stretches.append((max(start, piece.start), min(stop, piece.stop)))
        return stretches

    def finish(self) -> None:
        """Find out which replies are intact: those of which each piece was intact in the snapshot, or was redone."""
        for name, pieces in self._pieces.items():
            item = self._optimizers.find(name)
            if item is not None and item.steps.main.retained is not None:
                last = self._last_step.get(name, 0)
                item.steps.main.retained.intact &= all(piece.intact for piece in pieces if piece.lsn >= last)


def _by_arena(pieces: list[snapshot.Piece]) -> dict[str, tuple[list[int], list[snapshot.Piece]]]:
    arenas: dict[str, tuple[list[int], list[snapshot.Piece]]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.start):
        starts, of_arena = arenas.setdefault(piece.dtype, ([], []))
        starts.append(piece.start)
        of_arena.append(piece)
    return arenas
