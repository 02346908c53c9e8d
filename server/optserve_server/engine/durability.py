"""What keeps state beyond the life of the process: the interface, and the setting that keeps nothing.

Everything that is told gets a number in one sequence, so that a snapshot can say up to which it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

import numpy as np

from optserve_server.numerics.layout import Layout
from optserve_server.numerics.settings import Settings


class StepRecord(NamedTuple):
    """A step that is about to be applied.

    Attributes:
        tensors: Indices of the parameters that take part; empty for all.
        operands: The gradients, run by run, and then the curvature if there is one.
        workers: (name, request id, clock after it) of each worker whose gradient is in it.
        staleness: By which the learning rate is scaled.
    """

    optimizer: str
    step: int
    request_id: str
    tensors: tuple[int, ...]
    operands: Sequence[np.ndarray]
    workers: Sequence[tuple[str, str, int]] = ()
    staleness: int = 0


@dataclass(frozen=True)
class CreationRecord:
    """An optimizer that is about to exist, with what a retry of its creation is answered by."""

    optimizer: str
    layout: Layout
    settings: Settings
    etag: str
    lineage: str
    request_id: str
    create_time: datetime


@dataclass(frozen=True)
class ReplacementRecord:
    """A state that is about to take the place of an optimizer's own.

    Attributes:
        arrays: (dtype, position among `Settings.arrays`, arena) of all of them, in order.
        placed_by: See `Steps.placed_by`.
        target: What the request asked for, in words.
    """

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


class Replacement(NamedTuple):
    """A restore or an import that was made.

    Attributes:
        target: What it has put in place, in words; empty where an earlier version has not written it down.
    """

    request_id: str
    target: str


@dataclass(frozen=True)
class PlacementRecord:
    """Parameters x that are about to be in place, run by run."""

    optimizer: str
    request_id: str
    parameters: Sequence[np.ndarray]


class Durability(Protocol):
    """Each call returns the number of what it was told once that will survive; if it raises, nothing is to change.

    Attributes:
        reads_staging: Whether it reads the staging buffer, in which nobody else may write meanwhile. One that does not
            need not be told of steps.
    """

    reads_staging: bool

    @property
    def problem(self) -> str:
        """What keeps changes from being made durable at the moment, in words; empty while nothing does."""
        ...

    def created(self, record: CreationRecord) -> int:
        """An optimizer is about to exist."""
        ...

    def updated(self, optimizer: str, settings: Settings, etag: str, time: datetime) -> int:
        """An optimizer is about to get other hyper-parameters."""
        ...

    def replaced(self, record: ReplacementRecord) -> int:
        """An optimizer is about to get another state."""
        ...

    def deleted(self, optimizer: str) -> int:
        """An optimizer is about to be gone."""
        ...

    def placing(self, record: PlacementRecord) -> int:
        """Parameters are about to be in place."""
        ...

    def stepping(self, record: StepRecord) -> int:
        """A step is about to be applied; its gradients are still in the staging buffer."""
        ...


class InMemory:
    """State ends with the process. Nothing is kept, and nothing numbered."""

    reads_staging = False
    problem = ""

    def created(self, record: CreationRecord) -> int:  # noqa: ARG002 - see Durability
        """Nothing to keep."""
        return 0

    def updated(self, optimizer: str, settings: Settings, etag: str, time: datetime) -> int:  # noqa: ARG002
        """Nothing to keep."""
        return 0

    def replaced(self, record: ReplacementRecord) -> int:  # noqa: ARG002
        """Nothing to keep."""
        return 0

    def deleted(self, optimizer: str) -> int:  # noqa: ARG002
        """Nothing to keep."""
        return 0

    def placing(self, record: PlacementRecord) -> int:  # noqa: ARG002
        """Nothing to keep."""
        return 0

    def stepping(self, record: StepRecord) -> int:  # noqa: ARG002
        """Nothing to keep."""
        return 0
