"""How optimizers are brought back from a snapshot and the journal: which changes are to be made once more, and where.

What a change changes is not known here, see `engine/transition.py`.
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
    """Brings optimizers forward, record by record; pieces of a snapshot each from their own number on."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._pieces: dict[str, list[snapshot.Piece]] = {}
        # The same by dtype, each with the starts of its pieces, in which a stretch is looked up.
        self._arenas: dict[str, dict[str, tuple[list[int], list[snapshot.Piece]]]] = {}
        self._newest_piece: dict[str, int] = {}
        self._last_step: dict[str, int] = {}

    def load(self, saved: snapshot.Saved) -> None:
        """Bring an optimizer of the snapshot back."""
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
        """Make a change of the journal once more, as far as it is not contained in what was loaded."""
        message, lsn = json.loads(entry.meta), entry.lsn
        item = self._optimizers.find(message["optimizer"])
        if item is None:
            if entry.type == records.CREATED:
                self._optimizers.adopt(CreationRecord.decode(message), lsn)
            return
        if lsn <= item.created_lsn:
            # Of one that bore the name before.
            return
        record = records.decode(entry.type, message, entry.payload, item.steps.payloads)
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
        given = [
            record.operands[begin : begin + len(runs)] for begin in range(0, len(record.operands), max(len(runs), 1))
        ]
        behind: list[Run] = []
        parts: list[tuple[int, int, int]] = []
        for turn, run in enumerate(runs):
            for start, stop in self._behind(item.id, lsn, run.dtype, run.start, run.stop):
                behind.append(Run(0, 0, run.dtype, run.wire, start, stop))
                parts.append((turn, start - run.start, stop - run.start))
        for arenas, arrays in zip(operands.values(), given, strict=bool(runs)):
            for run, (turn, first, end) in zip(behind, parts, strict=True):
                arenas[run.dtype][run.start : run.stop] = arrays[turn][first:end]
        # A norm is that of the whole step, of which some parts may not be behind.
        clip = item.state.measure(payload, given[0] if given else ())
        prepared = Prepared(clip.for_parts(parts) if clip else None, covered=False)
        transition.apply_step(item.state, operands, behind, record, prepared)
        if lsn > item.steps.lsn:
            transition.note_step(item.steps, record, payload.selection, lsn)
        self._last_step[item.id] = lsn

    def _place(self, item: Optimizer, record: PlacementRecord, lsn: int) -> None:
        runs = item.steps.payloads.payload_for(ALL, None).runs
        transition.apply_placement(item.state, runs, record, partial(self._behind, item.id, lsn))
        if lsn > item.steps.lsn:
            transition.note_placement(item.steps, record, lsn)

    def _replace(self, item: Optimizer, record: ReplacementRecord, lsn: int) -> None:
        transition.apply_replacement(item.state, record, partial(self._behind, item.id, lsn))
        if lsn > item.steps.lsn:
            transition.note_replacement(item.steps, record, lsn)

    def _behind(self, name: str, lsn: int, dtype: np.dtype, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of a part of an arena that do not contain the change `lsn` yet."""
        if lsn > self._newest_piece.get(name, 0):
            return [(start, stop)]
        starts, pieces = self._arenas[name].get(dtype.name, ([], []))
        stretches = []
        # From the piece that `start` is in; a step may have as many runs as there are parameters, and as many pieces.
        for position in range(max(0, bisect.bisect_right(starts, start) - 1), len(pieces)):
            piece = pieces[position]
            if piece.start >= stop:
                break
            if piece.lsn < lsn and max(start, piece.start) < min(stop, piece.stop):
                stretches.append((max(start, piece.start), min(stop, piece.stop)))
        return stretches

    def finish(self) -> None:
        """A reply is intact if each of its pieces was, where the piece was not computed anew."""
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
