"""What keeps state beyond the life of the process: the interface, and the setting that keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np

from optserve_server.layout import Layout
from optserve_server.rules import Rule


@dataclass(frozen=True)
class StepRecord:
    """A step that is about to be applied."""

    optimizer: str
    step: int
    request_id: str
    tensors: tuple[int, ...]
    gradients: Sequence[np.ndarray]


@dataclass(frozen=True)
class CreationRecord:
    """An optimizer that is about to exist, with what a retry of its creation is answered by."""

    optimizer: str
    layout: Layout
    rule: Rule
    etag: str
    request_id: str
    create_time: datetime


class Durability(Protocol):
    """Each call returns when what it was told will survive; if it raises, nothing is to change."""

    name: str

    def created(self, record: CreationRecord) -> None:
        """An optimizer is about to exist."""
        ...

    def updated(self, optimizer: str, rule: Rule, etag: str) -> None:
        """An optimizer is about to get other hyper-parameters."""
        ...

    def deleted(self, optimizer: str) -> None:
        """An optimizer is about to be gone."""
        ...

    def stepping(self, record: StepRecord) -> None:
        """A step is about to be applied; its gradients are still in the staging buffer."""
        ...


class InMemory:
    """State ends with the process."""

    name = "memory"

    def created(self, record: CreationRecord) -> None:
        """Nothing to keep."""

    def updated(self, optimizer: str, rule: Rule, etag: str) -> None:
        """Nothing to keep."""

    def deleted(self, optimizer: str) -> None:
        """Nothing to keep."""

    def stepping(self, record: StepRecord) -> None:
        """Nothing to keep."""
