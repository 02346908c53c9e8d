"""The record of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optserve_server.engine.record_encoding import STEPPED, Encoded, Message, operands_in
from optserve_server.numerics.layout import Payloads, Selection
from optserve_server.numerics.settings import UnknownSettingError
from optserve_server.numerics.step_settings import StepSettings


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
        settings: Settings for this step only; None for the optimizer's own.
    """

    optimizer: str
    step: int
    request_id: str
    selection: Selection
    operands: Sequence[np.ndarray]
    workers: Sequence[WorkerStep] = ()
    staleness: int = 0
    settings: StepSettings | None = None

    kind = STEPPED

    def encode(self) -> Encoded:
        """The encoding in the journal."""
        tensors = self.selection.listed
        # Servers that know no settings of a step look for `tensors`: without it they refuse the record, which they
        # would otherwise carry out with the optimizer's own settings.
        with_settings = self.settings and {"with": {"tensors": tensors, "settings": self.settings.to_json()}}
        message = {
            "optimizer": self.optimizer,
            "step": self.step,
            "request_id": self.request_id,
            **(with_settings or {"tensors": tensors}),
            **({"workers": self.workers} if self.workers else {}),
            **({"staleness": self.staleness} if self.staleness else {}),
        }
        return STEPPED, message, self.operands

    @classmethod
    def decode(cls, message: Message, data: memoryview, payloads: Payloads) -> StepRecord:
        """The reverse of `encode`; the operands are copies.

        Raises:
            UnknownSettingError: A newer server has written something about the step that this one does not know.
        """
        settings, tensors = None, message.get("tensors")
        if tensors is None:
            tensors, settings = _read_with(message["with"])
        selection = Selection(tuple(tensors))
        workers = tuple(WorkerStep(*worker) for worker in message.get("workers", ()))
        operands = list(operands_in(payloads.payload_for(selection, None), data))
        return cls(
            message["optimizer"], message["step"], message["request_id"], selection, operands, workers,
            message.get("staleness", 0), settings,
        )  # fmt: skip


def _read_with(content: Message) -> tuple[list[int], StepSettings]:
    """(tensors, settings) of a step that has settings of its own."""
    for name in content:
        if name not in ("tensors", "settings"):
            raise UnknownSettingError(
                f"this server does not know {name!r} of a step, which a newer server may have written"
            )
    return content["tensors"], StepSettings.from_json(content["settings"])
