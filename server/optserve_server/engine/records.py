"""The records of changes: a class for each kind, and its encoding. A record is written before its change is made.

    kind  record             payload
    1     CreationRecord
    2     UpdateRecord
    3     DeletionRecord
    4     StepRecord         the operands
    5     ReplacementRecord  all arrays
    6     PlacementRecord    the parameters x

Do not change the keys of a message or their order. This server reads the folders of older servers, and older servers
read the folders of this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

import numpy as np

from optserve_server.numerics.layout import ALL, Layout, Payload, Payloads, Selection
from optserve_server.numerics.parameter_steps import Written
from optserve_server.numerics.settings import Settings

CREATED, UPDATED, DELETED, STEPPED, REPLACED, PLACED = 1, 2, 3, 4, 5, 6
"""Kinds of records in the journal."""

Message = dict[str, Any]
"""All of a record except its arrays, as JSON."""

Encoded = tuple[int, Message, Sequence[np.ndarray]]
"""(kind, message, arrays): the encoding of a record. The bytes of the arrays are the record's payload."""

_NO_PARAMETERS = Payloads(Layout(()))


class ArenaValues(NamedTuple):
    """The values of one arena of one array.

    Attributes:
        dtype: The arena's dtype.
        array: The array's position among `Settings.arrays`.
        values: One-dimensional, with the values of all parameters of that dtype.
    """

    dtype: np.dtype
    array: int
    values: np.ndarray


@dataclass(frozen=True)
class CreationRecord:
    """The creation of an optimizer.

    Attributes:
        optimizer: Name of the optimizer.
        layout: Its parameters.
        settings: Its method and settings.
        etag: Its first etag.
        lineage: Its first lineage.
        request_id: Request id of the creation, by which the server recognizes a retry; may be empty.
        create_time: Time of the creation.
    """

    kind: ClassVar[int] = CREATED

    optimizer: str
    layout: Layout
    settings: Settings
    etag: str
    lineage: str
    request_id: str
    create_time: datetime

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        message = {
            "optimizer": self.optimizer,
            **self.settings.to_json(),
            "parameters": self.layout.to_json(),
            "etag": self.etag,
            "lineage": self.lineage,
            "request_id": self.request_id,
            "time": self.create_time.isoformat(),
        }
        return self.kind, message, ()

    @classmethod
    def decode(cls, message: Message) -> CreationRecord:
        """The reverse of `encode`."""
        return cls(
            message["optimizer"], Layout.from_json(message["parameters"]), Settings.from_json(message),
            message["etag"], message["lineage"], message["request_id"], datetime.fromisoformat(message["time"]),
        )  # fmt: skip


@dataclass(frozen=True)
class UpdateRecord:
    """A change of an optimizer's settings.

    Attributes:
        optimizer: Name of the optimizer.
        settings: The new settings.
        etag: The new etag.
        time: Time of the change.
    """

    kind: ClassVar[int] = UPDATED

    optimizer: str
    settings: Settings
    etag: str
    time: datetime

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        message = {
            "optimizer": self.optimizer,
            **self.settings.to_json(),
            "etag": self.etag,
            "time": self.time.isoformat(),
        }
        return self.kind, message, ()

    @classmethod
    def decode(cls, message: Message) -> UpdateRecord:
        """The reverse of `encode`."""
        return cls(
            message["optimizer"],
            Settings.from_json(message),
            message["etag"],
            datetime.fromisoformat(message["time"]),
        )


@dataclass(frozen=True)
class DeletionRecord:
    """The deletion of an optimizer."""

    kind: ClassVar[int] = DELETED

    optimizer: str

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        return self.kind, {"optimizer": self.optimizer}, ()


class WorkerStep(NamedTuple):
    """The part of one worker in a step.

    Attributes:
        name: Name of the worker.
        request_id: Request id of the worker's step.
        clock: The worker's clock after the step.
    """

    name: str
    request_id: str
    clock: int


class StepRecord(NamedTuple):
    """A step.

    Attributes:
        optimizer: Name of the optimizer.
        step: Number of steps applied before this one.
        request_id: Request id of the step; empty if workers have made the step.
        selection: The parameters that take part.
        operands: The gradients, run by run; then the curvature in the same way, if the method takes it.
        workers: Each worker whose gradient is in the step.
        staleness: Staleness in steps by which the learning rate is scaled; 0 for no scaling.
    """

    optimizer: str
    step: int
    request_id: str
    selection: Selection
    operands: Sequence[np.ndarray]
    workers: Sequence[WorkerStep] = ()
    staleness: int = 0

    kind = STEPPED

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        message = {
            "optimizer": self.optimizer,
            "step": self.step,
            "request_id": self.request_id,
            "tensors": self.selection.listed,
            **({"workers": self.workers} if self.workers else {}),
            **({"staleness": self.staleness} if self.staleness else {}),
        }
        return STEPPED, message, self.operands

    @classmethod
    def decode(cls, message: Message, data: memoryview, payloads: Payloads) -> StepRecord:
        """The reverse of `encode`; the operands are copies."""
        selection = Selection(tuple(message["tensors"]))
        workers = tuple(WorkerStep(*worker) for worker in message.get("workers", ()))
        operands = list(_operands(payloads.payload_for(selection, None), data))
        return cls(
            message["optimizer"], message["step"], message["request_id"], selection, operands, workers,
            message.get("staleness", 0),
        )  # fmt: skip


@dataclass(frozen=True)
class ReplacementRecord:
    """The replacement of an optimizer's state, by a restore or an import.

    Attributes:
        optimizer: Name of the optimizer.
        step: Its new step counter.
        settings: Its new settings.
        etag: Its new etag.
        lineage: Its new lineage.
        request_id: Request id of the replacement; may be empty.
        time: Time of the replacement.
        arrays: All arenas that are not empty, in the order of files.
        placed_by: See `Steps.placed_by`.
        target: What the request asked for, in words; empty if an earlier version wrote the record.
        parameter_steps: The number of steps that each parameter has taken part in; None if the rule does not use it, or
            if an earlier version wrote the record.
    """

    kind: ClassVar[int] = REPLACED

    optimizer: str
    step: int
    settings: Settings
    etag: str
    lineage: str
    request_id: str
    time: datetime
    arrays: Sequence[ArenaValues]
    placed_by: str | None = None
    target: str = ""
    parameter_steps: Written | None = None

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        message = {
            "optimizer": self.optimizer,
            "step": self.step,
            **self.settings.to_json(),
            "etag": self.etag,
            "lineage": self.lineage,
            "request_id": self.request_id,
            "time": self.time.isoformat(),
            "placed_by": self.placed_by,
            "target": self.target,
            **({} if self.parameter_steps is None else {"parameter_steps": self.parameter_steps}),
        }
        return self.kind, message, [values for _, _, values in self.arrays]

    @classmethod
    def decode(cls, message: Message, data: memoryview, payloads: Payloads) -> ReplacementRecord:
        """The reverse of `encode`; the arrays are views of the data."""
        settings = Settings.from_json(message)
        return cls(
            message["optimizer"], message["step"], settings, message["etag"], message["lineage"],
            message["request_id"], datetime.fromisoformat(message["time"]),
            list(_arenas(payloads.layout, len(settings.arrays), data)),
            message.get("placed_by"), message.get("target", ""), message.get("parameter_steps"),
        )  # fmt: skip


@dataclass(frozen=True)
class PlacementRecord:
    """The upload of the parameters x of a hosted optimizer.

    Attributes:
        optimizer: Name of the optimizer.
        request_id: Request id of the upload.
        parameters: The values of x, run by run.
    """

    kind: ClassVar[int] = PLACED

    optimizer: str
    request_id: str
    parameters: Sequence[np.ndarray]

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        return self.kind, {"optimizer": self.optimizer, "request_id": self.request_id}, self.parameters

    @classmethod
    def decode(cls, message: Message, data: memoryview, payloads: Payloads) -> PlacementRecord:
        """The reverse of `encode`; the parameters are copies."""
        return cls(message["optimizer"], message["request_id"], list(_operands(payloads.payload_for(ALL, None), data)))


Change = CreationRecord | UpdateRecord | DeletionRecord | StepRecord | ReplacementRecord | PlacementRecord
"""A record of any kind."""


def decode(kind: int, message: Message, data: memoryview, payloads: Payloads = _NO_PARAMETERS) -> Change | None:
    """Decode a record.

    Args:
        kind: Its kind.
        message: Its message.
        data: The bytes of its arrays.
        payloads: The payloads of the optimizer. A creation, an update and a deletion do not need them.

    Returns:
        The record; None if its kind is unknown.

    Raises:
        ValueError, KeyError or TypeError: The message or the data is not valid.
    """
    record: Change | None = None
    match kind:
        case CreationRecord.kind:
            record = CreationRecord.decode(message)
        case UpdateRecord.kind:
            record = UpdateRecord.decode(message)
        case DeletionRecord.kind:
            record = DeletionRecord(message["optimizer"])
        case StepRecord.kind:
            record = StepRecord.decode(message, data, payloads)
        case ReplacementRecord.kind:
            record = ReplacementRecord.decode(message, data, payloads)
        case PlacementRecord.kind:
            record = PlacementRecord.decode(message, data, payloads)
    return record


def _operands(payload: Payload, data: memoryview) -> Iterator[np.ndarray]:
    """Copies of the operands in a record, one operand after the other, each run by run."""
    for begin in range(0, len(data), max(payload.size_bytes, 1)):
        for run in payload.runs:
            yield np.frombuffer(data[begin + run.begin : begin + run.end], run.dtype).copy()


def _arenas(layout: Layout, arrays: int, data: memoryview) -> Iterator[ArenaValues]:
    """The arenas of the first `arrays` arrays in a record, as views of its data."""
    begin = 0
    for dtype, array, size in layout.each_arena(arrays):
        end = begin + size * dtype.itemsize
        yield ArenaValues(dtype, array, np.frombuffer(data[begin:end], dtype))
        begin = end
