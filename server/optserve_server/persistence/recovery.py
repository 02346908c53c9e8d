"""What the journal says of optimizers, and how they are brought back from it and from a snapshot.

Each change has a message that is written before it is made, and is made once more here after a crash.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from datetime import datetime
from itertools import repeat
from typing import Any

import numpy as np

from optserve_server.engine.durability import (
    CreationRecord,
    PlacementRecord,
    Replacement,
    ReplacementRecord,
    StepRecord,
)
from optserve_server.engine.registry import Optimizer, Optimizers
from optserve_server.engine.transaction import Retained
from optserve_server.numerics.layout import Layout, Payload, Run
from optserve_server.numerics.settings import PARAMETER, Settings
from optserve_server.persistence import snapshot
from optserve_server.persistence.journal import Record

CREATED, UPDATED, DELETED, STEPPED, REPLACED, PLACED = 1, 2, 3, 4, 5, 6
"""Record types of the journal."""


def creation(record: CreationRecord) -> dict[str, Any]:
    """The message of a creation."""
    return {
        "optimizer": record.optimizer,
        **record.settings.to_json(),
        "parameters": record.layout.to_json(),
        "etag": record.etag,
        "lineage": record.lineage,
        "request_id": record.request_id,
        "time": record.create_time.isoformat(),
    }


def update(optimizer: str, settings: Settings, etag: str, time: datetime) -> dict[str, Any]:
    """The message of a change of hyper-parameters."""
    return {"optimizer": optimizer, **settings.to_json(), "etag": etag, "time": time.isoformat()}


def step(record: StepRecord) -> dict[str, Any]:
    """The message of a step; the operands are its payload."""
    return {
        "optimizer": record.optimizer,
        "step": record.step,
        "request_id": record.request_id,
        "tensors": record.tensors,
        **({"workers": record.workers} if record.workers else {}),
        **({"staleness": record.staleness} if record.staleness else {}),
    }


def replacement(record: ReplacementRecord) -> dict[str, Any]:
    """The message of a replaced state; all of its arrays are its payload."""
    return {
        "optimizer": record.optimizer,
        "step": record.step,
        **record.settings.to_json(),
        "etag": record.etag,
        "lineage": record.lineage,
        "request_id": record.request_id,
        "time": record.time.isoformat(),
        "placed_by": record.placed_by,
        "target": record.target,
    }


def placement(record: PlacementRecord) -> dict[str, Any]:
    """The message of uploaded parameters, which are its payload."""
    return {"optimizer": record.optimizer, "request_id": record.request_id}


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
        item.update_time = saved.time("update_time")
        item.replacements.extend(map(Replacement, header["replacement_request_ids"], header.get("targets", repeat(""))))
        item.steps.step, item.steps.lsn = header["step"], header["lsn"]
        item.steps.placed_by = header.get("placed_by")
        item.steps.workers.roster.from_json(header.get("workers", {}))
        if header["retained"]:
            retained = header["retained"]
            item.steps.main.retained = Retained(
                retained["request_id"], retained["step"], tuple(retained["tensors"]), retained["intact"]
            )
        with item.steps.held_still() as state:
            saved.load(state, item.steps.main.staging)
        self._pieces[item.id] = saved.pieces
        self._arenas[item.id] = _by_arena(saved.pieces)
        self._newest_piece[item.id] = max((piece.lsn for piece in saved.pieces), default=0)

    def redo(self, record: Record) -> None:
        """Make a change of the journal once more, as far as it is not contained in what was loaded."""
        message = json.loads(record.meta)
        name = message["optimizer"]
        item = self._optimizers.find(name)
        if item is not None and record.lsn <= item.created_lsn:
            # Of one that bore the name before.
            return
        known = item is not None and record.lsn <= item.steps.lsn
        if record.type == CREATED and not known:
            self._create(message, record.lsn)
        elif record.type == STEPPED and item is not None:
            self._step(item, message, record)
        elif record.type == REPLACED and item is not None:
            self._replace(item, message, record)
        elif record.type == PLACED and item is not None:
            self._place(item, message, record)
        elif record.type == UPDATED and item is not None and not known:
            item.state.set(Settings.from_json(message))
            item.etag, item.update_time = message["etag"], datetime.fromisoformat(message["time"])
            item.steps.lsn = record.lsn
        elif record.type == DELETED and not known:
            self._optimizers.forget(name)
            self._pieces.pop(name, None)
            self._arenas.pop(name, None)
            self._newest_piece.pop(name, None)

    def _create(self, message: dict[str, Any], lsn: int) -> None:
        created = CreationRecord(
            message["optimizer"], Layout.from_json(message["parameters"]), Settings.from_json(message), message["etag"],
            message["lineage"], message["request_id"], datetime.fromisoformat(message["time"]),
        )  # fmt: skip
        self._optimizers.adopt(created, lsn)

    def _step(self, item: Optimizer, message: dict[str, Any], record: Record) -> None:
        tensors = tuple(message["tensors"]) or tuple(range(len(item.layout.parameters)))
        payload = Payload(item.layout, tensors)
        with item.steps.held_still() as state:
            operands = item.steps.main.staging.operands
            given = list(_operands(payload, record.payload, len(operands)))
            # A norm is that of the whole step, of which some parts may not be behind.
            state.clip(payload, given[0])
            behind: list[Run] = []
            for position, run in enumerate(payload.runs):
                stretches = self._behind(item.id, run.dtype, run.start, run.stop, record.lsn)
                behind += [Run(0, 0, run.dtype, run.wire, start, stop) for start, stop in stretches]
                for arenas, arrays in zip(operands.values(), given, strict=True):
                    for start, stop in stretches:
                        arenas[run.dtype][start:stop] = arrays[position][start - run.start : stop - run.start]
            state.apply(operands, behind, message["step"], message.get("staleness", 0))
        if record.lsn > item.steps.lsn:
            item.steps.lsn, item.steps.step = record.lsn, message["step"] + 1
            for worker, request_id, clock in message.get("workers", ()):
                made = Retained(request_id, item.steps.step, payload.tensors, intact=False)
                item.steps.workers.roster.made_step(worker, made, clock)
            own = Retained(message["request_id"], item.steps.step, payload.tensors)
            item.steps.main.retained = None if "workers" in message else own
        self._last_step[item.id] = record.lsn

    def _place(self, item: Optimizer, message: dict[str, Any], record: Record) -> None:
        layout = item.layout
        payload = Payload(layout, tuple(range(len(layout.parameters))))
        (given,) = _operands(payload, record.payload, 1)
        with item.steps.held_still() as state:
            array = item.settings.arrays.index(PARAMETER)
            for run, values in zip(payload.runs, given, strict=True):
                for start, stop in self._behind(item.id, run.dtype, run.start, run.stop, record.lsn):
                    state.write(run.dtype, array, start, values[start - run.start : stop - run.start])
        if record.lsn > item.steps.lsn:
            item.steps.lsn, item.steps.placed_by = record.lsn, message["request_id"]

    def _replace(self, item: Optimizer, message: dict[str, Any], record: Record) -> None:
        """Put the state in place, in each piece that does not contain it yet."""
        settings = Settings.from_json(message)
        with item.steps.held_still() as state:
            for dtype, slot, values in _arrays(item.layout, settings, record.payload):
                for start, stop in self._behind(item.id, dtype, 0, values.size, record.lsn):
                    state.write(dtype, slot, start, values[start:stop])
        if record.lsn > item.steps.lsn:
            item.state.set(settings)
            item.state.forget_last_step()
            item.steps.lsn, item.steps.step = record.lsn, message["step"]
            item.steps.lineage, item.steps.main.retained = message["lineage"], None
            item.steps.workers.forget_replies()
            item.steps.placed_by = message.get("placed_by")
            item.replaced(_replacement(item, message))

    def _behind(self, name: str, dtype: np.dtype, start: int, stop: int, lsn: int) -> list[tuple[int, int]]:
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


def _operands(payload: Payload, data: memoryview, count: int) -> Iterator[list[np.ndarray]]:
    """Copies of the operands of a step, each run by run."""
    for turn in range(count):
        start = turn * payload.size_bytes
        yield [np.frombuffer(data[start + run.begin : start + run.end], run.dtype).copy() for run in payload.runs]


def _replacement(item: Optimizer, message: dict[str, Any]) -> ReplacementRecord:
    """A replacement as it was told, but for its arrays."""
    return ReplacementRecord(
        item.id, message["step"], Settings.from_json(message), message["etag"], message["lineage"],
        message["request_id"], datetime.fromisoformat(message["time"]), (),
        target=message.get("target", ""),
    )  # fmt: skip


def _arrays(layout: Layout, settings: Settings, payload: memoryview) -> Iterator[tuple[np.dtype, int, np.ndarray]]:
    """The arenas of all arrays in the payload of a replacement, which are those of a state file."""
    begin = 0
    for dtype, slot, size in layout.each_arena(len(settings.arrays)):
        end = begin + size * dtype.itemsize
        yield dtype, slot, np.frombuffer(payload[begin:end], dtype)
        begin = end
