"""The records of changes: a class for each kind, and its encoding. A record is written before its change is made.

    kind  record             payload
    1     CreationRecord
    2     UpdateRecord
    3     DeletionRecord
    4     StepRecord         the operands
    5     ReplacementRecord  all arrays
    6     PlacementRecord    the parameters x
    7     AdditionRecord     the x of the new parameters

Do not change the keys of a message or their order. This server reads the folders of older servers, and older servers
read the folders of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

import numpy as np

from optserve_server.engine.addition_record import AdditionRecord
from optserve_server.engine.record_encoding import (
    CREATED,
    DELETED,
    PLACED,
    REPLACED,
    UPDATED,
    ArenaValues,
    Encoded,
    Message,
    arenas_in,
    operands_in,
)
from optserve_server.engine.step_record import StepRecord
from optserve_server.numerics.layout import ALL, Layout, Payloads
from optserve_server.numerics.parameter_steps import Written
from optserve_server.numerics.settings import Settings

_NO_PARAMETERS = Payloads(Layout(()))


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
            list(arenas_in(payloads.layout, len(settings.arrays), data)),
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
        parameters = operands_in(payloads.payload_for(ALL, None), data)
        return cls(message["optimizer"], message["request_id"], list(parameters))


Change = (
    CreationRecord | UpdateRecord | DeletionRecord | StepRecord | ReplacementRecord | PlacementRecord | AdditionRecord
)
"""A record of any kind."""


def decode(kind: int, message: Message, data: memoryview, payloads: Payloads = _NO_PARAMETERS) -> Change | None:
    """Decode a record.

    Args:
        kind: Its kind.
        message: Its message.
        data: The bytes of its arrays.
        payloads: The payloads of the optimizer. A creation, an update, a deletion and an addition do not need them.

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
        case AdditionRecord.kind:
            record = AdditionRecord.decode(message, data)
    return record
