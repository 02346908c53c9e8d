"""What is written down of each change of an optimizer before it is made: one record each, and its form in the journal.

    kind  record             payload
    1     CreationRecord
    2     UpdateRecord
    3     DeletionRecord
    4     StepRecord         the operands
    5     ReplacementRecord  all arrays
    6     PlacementRecord    the parameters x

The keys of a message and their order stay as they are: folders of older servers are read, and older servers read these.
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
"""All of a record but its arrays, as JSON."""

Encoded = tuple[int, Message, Sequence[np.ndarray]]
"""(kind, message, arrays) of a record, as the journal takes it."""

_NO_PARAMETERS = Payloads(Layout(()))


@dataclass(frozen=True)
class CreationRecord:
    """An optimizer that is about to exist, with what a retry of its creation is answered by."""

    kind: ClassVar[int] = CREATED

    optimizer: str
    layout: Layout
    settings: Settings
    etag: str
    lineage: str
    request_id: str
    create_time: datetime

    def encode(self) -> Encoded:
        """The form in the journal."""
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
    """Other settings that an optimizer is about to have."""

    kind: ClassVar[int] = UPDATED

    optimizer: str
    settings: Settings
    etag: str
    time: datetime

    def encode(self) -> Encoded:
        """The form in the journal."""
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
    """An optimizer that is about to be gone."""

    kind: ClassVar[int] = DELETED

    optimizer: str

    def encode(self) -> Encoded:
        """The form in the journal."""
        return self.kind, {"optimizer": self.optimizer}, ()


class StepRecord(NamedTuple):
    """A step that is about to be applied.

    Attributes:
        step: Steps applied before.
        request_id: Of the step; empty where workers have made it.
        selection: What takes part.
        operands: The gradients, run by run, and then the curvature if there is one.
        workers: (name, request id, clock after it) of each worker whose gradient is in it.
        staleness: By which the learning rate is scaled.
    """

    optimizer: str
    step: int
    request_id: str
    selection: Selection
    operands: Sequence[np.ndarray]
    workers: Sequence[tuple[str, str, int]] = ()
    staleness: int = 0

    kind = STEPPED

    def encode(self) -> Encoded:
        """The form in the journal."""
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
        workers = tuple((name, request_id, clock) for name, request_id, clock in message.get("workers", ()))
        operands = list(_operands(payloads.payload_for(selection, None), data))
        return cls(
            message["optimizer"], message["step"], message["request_id"], selection, operands, workers,
            message.get("staleness", 0),
        )  # fmt: skip


@dataclass(frozen=True)
class ReplacementRecord:
    """A state that is about to take the place of an optimizer's own.

    Attributes:
        step: Its step counter from then on.
        arrays: (dtype, position among `Settings.arrays`, arena) of all of them that are not empty, in order.
        placed_by: See `Steps.placed_by`.
        target: What the request asked for, in words; empty where an earlier version has not written it down.
        parameter_steps: Steps that each parameter has taken part in; None where the rule does not use it, or an earlier
            version has not written it down.
    """

    kind: ClassVar[int] = REPLACED

    optimizer: str
    step: int
    settings: Settings
    etag: str
    lineage: str
    request_id: str
    time: datetime
    arrays: Sequence[tuple[np.dtype, int, np.ndarray]]
    placed_by: str | None = None
    target: str = ""
    parameter_steps: Written | None = None

    def encode(self) -> Encoded:
        """The form in the journal."""
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
        return self.kind, message, [array for _, _, array in self.arrays]

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
    """Parameters x that are about to be in place, run by run."""

    kind: ClassVar[int] = PLACED

    optimizer: str
    request_id: str
    parameters: Sequence[np.ndarray]

    def encode(self) -> Encoded:
        """The form in the journal."""
        return self.kind, {"optimizer": self.optimizer, "request_id": self.request_id}, self.parameters

    @classmethod
    def decode(cls, message: Message, data: memoryview, payloads: Payloads) -> PlacementRecord:
        """The reverse of `encode`; the parameters are copies."""
        return cls(message["optimizer"], message["request_id"], list(_operands(payloads.payload_for(ALL, None), data)))


Change = CreationRecord | UpdateRecord | DeletionRecord | StepRecord | ReplacementRecord | PlacementRecord
"""A record of any kind."""


def decode(kind: int, message: Message, data: memoryview, payloads: Payloads = _NO_PARAMETERS) -> Change | None:
    """The record that was encoded; None for one of an unknown kind.

    Args:
        kind: Its kind.
        message: Its message.
        data: The bytes of its arrays.
        payloads: Of the optimizer; a creation, an update and a deletion need none.

    Raises:
        ValueError: It means nothing; so for KeyError and TypeError.
    """
    found: Change | None = None
    match kind:
        case CreationRecord.kind:
            found = CreationRecord.decode(message)
        case UpdateRecord.kind:
            found = UpdateRecord.decode(message)
        case DeletionRecord.kind:
            found = DeletionRecord(message["optimizer"])
        case StepRecord.kind:
            found = StepRecord.decode(message, data, payloads)
        case ReplacementRecord.kind:
            found = ReplacementRecord.decode(message, data, payloads)
        case PlacementRecord.kind:
            found = PlacementRecord.decode(message, data, payloads)
    return found


def _operands(payload: Payload, data: memoryview) -> Iterator[np.ndarray]:
    """Copies of the operands of a step, run by run, one operand after the other."""
    for begin in range(0, len(data), max(payload.size_bytes, 1)):
        for run in payload.runs:
            yield np.frombuffer(data[begin + run.begin : begin + run.end], run.dtype).copy()


def _arenas(layout: Layout, count: int, data: memoryview) -> Iterator[tuple[np.dtype, int, np.ndarray]]:
    """The arenas of so many arrays, one after the other."""
    begin = 0
    for dtype, array, size in layout.each_arena(count):
        end = begin + size * dtype.itemsize
        yield dtype, array, np.frombuffer(data[begin:end], dtype)
        begin = end
