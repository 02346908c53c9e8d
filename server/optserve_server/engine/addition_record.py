"""The record of parameters that a live optimizer gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from optserve_server.engine.record_encoding import ADDED, ADDED_TO, ArenaValues, Encoded, Message, arenas_in
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.settings import Settings


@dataclass(frozen=True)
class AdditionRecord:
    """The addition of parameters to an optimizer.

    Attributes:
        optimizer: Name of the optimizer.
        added: The new parameters, as a layout of their own.
        settings: All settings of the optimizer after the addition.
        etag: Its new etag.
        request_id: Request id of the addition.
        target: What the request asked for, in words.
        time: Time of the addition.
        parameters: The values of x of the new parameters, by arenas of `added`; none in delta mode.
    """

    kind: ClassVar[int] = ADDED

    optimizer: str
    added: Layout
    settings: Settings
    etag: str
    request_id: str
    target: str
    time: datetime
    parameters: Sequence[ArenaValues]

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        message = {
            ADDED_TO: self.optimizer,
            **self.settings.to_json(),
            "parameters": self.added.to_json(),
            "etag": self.etag,
            "request_id": self.request_id,
            "target": self.target,
            "time": self.time.isoformat(),
        }
        return self.kind, message, [values for _, _, values in self.parameters]

    @classmethod
    def decode(cls, message: Message, data: memoryview) -> AdditionRecord:
        """The reverse of `encode`; the values of x are views of the data."""
        added, settings = Layout.from_json(message["parameters"]), Settings.from_json(message)
        return cls(
            message[ADDED_TO], added, settings, message["etag"], message["request_id"], message["target"],
            datetime.fromisoformat(message["time"]), list(arenas_in(added, int(settings.hosted), data)),
        )  # fmt: skip
