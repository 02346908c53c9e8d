"""How the gradients of several workers on one optimizer come together: one strategy for each kind.

A strategy decides; who waits, and on what, is `engine/workers/coordinator.py`'s.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

from optserve_server.domain import refusals
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.gradient_mean import Gradient, merge
from optserve_server.numerics.layout import Payload, Selection

if TYPE_CHECKING:
    from optserve_server.numerics.staging import Staging

LEASE_S = 30.0
MAX_WORKERS = 4096
"""Most that one step can need."""

_WRITTEN: dict[str, Any] = {
    "staleness": 0, "workers": 0, "backup_workers": 0, "lease_s": LEASE_S, "scale_by_staleness": False,
}  # fmt: skip
"""What is written down of each kind, in this order: servers of earlier versions read the fields of all of them."""

_Worker = TypeVar("_Worker")


class Crowd(Protocol):
    """The workers, as a strategy sees them."""

    def slowest(self, default: int) -> int:
        """The least number of steps that one of those alive has made; `default` where none is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Consistency(abc.ABC):
    """How workers share an optimizer. Use a subclass.

    Attributes:
        kind: Its name in the contract.
        waits: Whether a worker's commit may wait for other workers.
        lease_s: How long a worker lives after its last report.
        scale_by_staleness: Divide the learning rate by 1 + the steps applied since the x that the gradient was taken
            at (Zhang et al., arXiv:1511.05950). Not the gradient: most rules would scale that up again.
    """

    kind: ClassVar[str]
    waits: ClassVar[bool] = True

    lease_s: float = LEASE_S
    scale_by_staleness: bool = False

    # What is checked when it is set.

    def check(self) -> None:
        """Raise INVALID_FIELD for impossible values."""
        if not 1 <= self.lease_s <= 3600:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"A lease lasts 1 s to an hour, not {self.lease_s:g} s.",
                field="optimizer.consistency.lease",
            )

    def check_room(self, gradient_bytes: int, config: ServerConfig) -> None:  # noqa: B027
        """Raise INVALID_FIELD if a step takes more workers than can be connected, or more bytes than there is room.

        Args:
            gradient_bytes: What one worker's buffer takes.
            config: The server's.
        """

    # What is decided for each gradient.

    @property
    def needed(self) -> int:
        """Workers that must be alive, so that one of them can expect to be done with waiting."""
        return 0

    def check_gradient(self, name: str, taken_at: int, step: int) -> None:  # noqa: B027
        """Raise GRADIENT_LATE for one that cannot become a step any more.

        Args:
            name: The optimizer's, for messages.
            taken_at: Step of the x that it was taken at.
            step: The present one.
        """

    def check_alike(self, selection: Selection, others: Iterable[Selection]) -> None:  # noqa: B027
        """Raise INVALID_FIELD for one of other tensors than those with which it is to be merged.

        Args:
            selection: What it is of.
            others: Those of the gradients that are there.
        """

    @abc.abstractmethod
    def may_apply(self, clock: int, arrived: int, crowd: Crowd) -> bool:
        """Whether a step can be applied now that a worker's gradient is there.

        Args:
            clock: Steps that this worker has made.
            arrived: Gradients that are there and not applied, its own included.
            crowd: All workers.
        """

    def taken(self, worker: _Worker, arrived: Collection[_Worker]) -> Collection[_Worker]:  # noqa: ARG002
        """Those whose gradients become the step that may be applied.

        Args:
            worker: Whose gradient has come last.
            arrived: All whose gradients are there.
        """
        return (worker,)

    def merge(self, payload: Payload, gradients: Sequence[Gradient], room: Callable[[], Staging]) -> Gradient:  # noqa: ARG002
        """One gradient of those that are taken.

        Args:
            payload: What takes part, in all of them.
            gradients: In an order that does not depend on when they came.
            room: Gives a buffer for what is made of them.
        """
        return gradients[0]

    def scaled_by(self, staleness: int) -> int:
        """By how many steps of staleness the learning rate is divided, for a gradient that is so many steps old."""
        return staleness if self.scale_by_staleness else 0

    @abc.abstractmethod
    def frees_others(self, clock: int, crowd: Crowd) -> bool:
        """Whether a step may have let others go on that waited.

        Args:
            clock: Steps that its worker has made, this one included.
            crowd: All workers.
        """

    # Its form in messages and on disk.

    def values(self) -> dict[str, Any]:
        """What is of this kind alone, by field name."""
        common = {item.name for item in fields(Consistency)}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in common}

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return {
            "kind": self.kind,
            **{name: getattr(self, name, absent) for name, absent in _WRITTEN.items()},
            **self.values(),
        }

    @classmethod
    def names(cls) -> set[str]:
        """All that may be written down of it."""
        return {"kind", *_WRITTEN, *(item.name for item in fields(cls))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`; what is written down of other kinds is left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class AsyncConsistency(Consistency):
    """Gradients are applied in the order of arrival."""

    kind = "async"
    waits = False

    def may_apply(self, clock: int, arrived: int, crowd: Crowd) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def frees_others(self, clock: int, crowd: Crowd) -> bool:  # noqa: ARG002
        """Nobody waits."""
        return False


@dataclass(frozen=True, kw_only=True)
class BoundedConsistency(Consistency):
    """Likewise, but a worker that has made more than `staleness` steps more than the slowest live one waits.

    Attributes:
        staleness: In steps of a worker.
    """

    kind = "bounded"

    staleness: int = 0

    def may_apply(self, clock: int, arrived: int, crowd: Crowd) -> bool:  # noqa: ARG002
        """Unless the worker is too far ahead."""
        return clock - crowd.slowest(clock) <= self.staleness

    def frees_others(self, clock: int, crowd: Crowd) -> bool:
        """Where its worker was the last of the slowest."""
        return crowd.slowest(clock) >= clock


@dataclass(frozen=True, kw_only=True)
class SyncConsistency(Consistency):
    """A step is the mean of the gradients of `workers` workers, all taken at the same x.

    Attributes:
        workers: W.
        backup_workers: b: of the W + b workers the first W of each step count.
    """

    kind = "sync"

    workers: int = 0
    backup_workers: int = 0

    def check(self) -> None:
        """See Consistency."""
        if not 1 <= self.workers <= MAX_WORKERS:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"A step takes the gradients of 1 to {MAX_WORKERS} workers, not of {self.workers}.",
                field="optimizer.consistency.sync.workers",
            )
        super().check()

    def check_room(self, gradient_bytes: int, config: ServerConfig) -> None:
        """See Consistency. The gradients of a step are all there at a time."""
        wanted = self.workers * gradient_bytes
        if self.workers > 1 and wanted > config.max_optimizer_staged_bytes:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"The gradients of {self.workers} workers take {wanted} bytes at a time; this server has room "
                f"for {config.max_optimizer_staged_bytes} (max_optimizer_staged_bytes).",
                field="optimizer.consistency.sync.workers",
            )
        if self.workers + self.backup_workers >= config.max_streams:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{self.workers} workers and {self.backup_workers} more cannot be connected: this server "
                f"takes {config.max_streams} streams, one of which is needed for pulls.",
                field="optimizer.consistency.sync.workers",
            )

    @property
    def needed(self) -> int:
        """W."""
        return self.workers

    def check_gradient(self, name: str, taken_at: int, step: int) -> None:
        """See Consistency. All of a step are taken at the same x."""
        if taken_at != step:
            raise refusals.gradient_late(name, step, taken_at)

    def check_alike(self, selection: Selection, others: Iterable[Selection]) -> None:
        """See Consistency."""
        # All of them are alike.
        if next(iter(others), selection) != selection:
            raise OptserveError(
                Reason.INVALID_FIELD,
                "The gradients of one step are of the same parameters; other workers' are of others.",
                field="tensors",
            )

    def may_apply(self, clock: int, arrived: int, crowd: Crowd) -> bool:  # noqa: ARG002
        """Once W are there."""
        return arrived >= self.workers

    def taken(self, worker: _Worker, arrived: Collection[_Worker]) -> Collection[_Worker]:  # noqa: ARG002
        """All that are there."""
        return arrived

    def merge(self, payload: Payload, gradients: Sequence[Gradient], room: Callable[[], Staging]) -> Gradient:
        """Their mean."""
        return merge(payload, gradients, room())

    def frees_others(self, clock: int, crowd: Crowd) -> bool:  # noqa: ARG002
        """The others whose gradients it has."""
        return True


CONSISTENCIES: dict[str, type[Consistency]] = {
    kind.kind: kind for kind in (AsyncConsistency, BoundedConsistency, SyncConsistency)
}
"""Every kind by its name in the contract."""
