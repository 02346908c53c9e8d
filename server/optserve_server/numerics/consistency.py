"""When a worker's step is applied, and of which gradients: one strategy for each kind of consistency.

A strategy decides; `engine/workers` makes the workers wait.
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
"""Most workers whose gradients can make one step."""

_WRITTEN: dict[str, Any] = {
    "staleness": 0, "workers": 0, "backup_workers": 0, "lease_s": LEASE_S, "scale_by_staleness": False,
}  # fmt: skip
"""The fields that are written down for every kind, in this order, because earlier servers read all of them."""

_Worker = TypeVar("_Worker")


class WorkerClocks(Protocol):
    """The numbers of steps that the workers have made."""

    def slowest(self, default: int) -> int:
        """The least number of steps that a live worker has made; `default` if no worker is alive."""
        ...


@dataclass(frozen=True, kw_only=True)
class Consistency(abc.ABC):
    """How workers share an optimizer. Use a subclass.

    Attributes:
        kind: Its name in the contract.
        waits: Whether a worker's commit may wait for other workers.
        merges: Whether a step may be made of several workers' gradients.
        lease_s: Seconds for which a worker counts as alive after its last report.
        scale_by_staleness: Divide the learning rate by 1 + the staleness of the gradient (Zhang et al.,
            arXiv:1511.05950). The gradient itself is not divided: most rules would cancel that.
    """

    kind: ClassVar[str]
    waits: ClassVar[bool] = True
    merges: ClassVar[bool] = False

    lease_s: float = LEASE_S
    scale_by_staleness: bool = False

    # Checks of the settings.

    def check(self) -> None:
        """Raise INVALID_FIELD for impossible values."""
        if not 1 <= self.lease_s <= 3600:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"A lease lasts 1 s to an hour, not {self.lease_s:g} s.",
                field="optimizer.consistency.lease",
            )

    def check_capacity(self, gradient_bytes: int, config: ServerConfig) -> None:  # noqa: B027
        """Raise INVALID_FIELD if a step needs more workers than can be connected, or more bytes than the limits allow.

        Args:
            gradient_bytes: Bytes of one worker's buffer.
            config: The server's settings.
        """

    # Decisions about each gradient.

    @property
    def needed(self) -> int:
        """Least number of live workers with which a step can be applied."""
        return 0

    def check_gradient(self, name: str, taken_at: int, step: int) -> None:  # noqa: B027
        """Raise GRADIENT_LATE for a gradient that can no longer be applied.

        Args:
            name: The optimizer's name, for messages.
            taken_at: The step of the x at which the gradient was taken.
            step: The present step.
        """

    def check_alike(self, selection: Selection, others: Iterable[Selection]) -> None:  # noqa: B027
        """Raise INVALID_FIELD if a gradient has other parameters than the gradients that it is merged with.

        Args:
            selection: The parameters of the gradient.
            others: The selections of the gradients that have arrived.
        """

    @abc.abstractmethod
    def may_apply(self, clock: int, arrived: int, clocks: WorkerClocks) -> bool:
        """Whether a step can be applied now that a worker's gradient has arrived.

        Args:
            clock: Steps that this worker has made.
            arrived: Number of gradients that have arrived and are not applied, this one included.
            clocks: The steps that all workers have made.
        """

    def contributors(self, worker: _Worker, arrived: Collection[_Worker]) -> Collection[_Worker]:  # noqa: ARG002
        """The workers whose gradients make the step that may be applied.

        Args:
            worker: The worker whose gradient has arrived last.
            arrived: All workers whose gradients have arrived.
        """
        return (worker,)

    def merge(self, payload: Payload, gradients: Sequence[Gradient], make_buffer: Callable[[], Staging]) -> Gradient:  # noqa: ARG002
        """Merge the gradients of the contributors into one.

        Args:
            payload: The parameters, the same for all gradients.
            gradients: In an order that does not depend on the order of arrival.
            make_buffer: Makes the buffer for the result.
        """
        return gradients[0]

    def scaled_by(self, staleness: int) -> int:
        """The staleness by which the learning rate is divided: that of the gradient, or 0."""
        return staleness if self.scale_by_staleness else 0

    @abc.abstractmethod
    def may_wake_others(self, clock: int, clocks: WorkerClocks) -> bool:
        """Whether workers that wait may be able to go on after a step.

        Args:
            clock: Steps that the step's worker has made, this one included.
            clocks: The steps that all workers have made.
        """

    # The form in messages and on disk.

    def values(self) -> dict[str, Any]:
        """The fields of this kind alone, by name."""
        common = {item.name for item in fields(Consistency)}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in common}

    def to_json(self) -> dict[str, Any]:
        """The form on disk."""
        return {
            "kind": self.kind,
            **{name: getattr(self, name, absent) for name, absent in _WRITTEN.items()},
            **self.values(),
        }

    @classmethod
    def field_names(cls) -> set[str]:
        """Names of all fields that the form on disk may have."""
        return {"kind", *_WRITTEN, *(item.name for item in fields(cls))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`; it ignores the fields of other kinds."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class AsyncConsistency(Consistency):
    """Gradients are applied in the order of arrival."""

    kind = "async"
    waits = False

    def may_apply(self, clock: int, arrived: int, clocks: WorkerClocks) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def may_wake_others(self, clock: int, clocks: WorkerClocks) -> bool:  # noqa: ARG002
        """Never, because nobody waits."""
        return False


@dataclass(frozen=True, kw_only=True)
class BoundedConsistency(Consistency):
    """As async, but a worker that is more than `staleness` steps ahead of the slowest live one waits.

    Attributes:
        staleness: Steps that a worker may be ahead.
    """

    kind = "bounded"

    staleness: int = 0

    def may_apply(self, clock: int, arrived: int, clocks: WorkerClocks) -> bool:  # noqa: ARG002
        """Unless the worker is too far ahead."""
        return clock - clocks.slowest(clock) <= self.staleness

    def may_wake_others(self, clock: int, clocks: WorkerClocks) -> bool:
        """If no live worker is slower than this one now."""
        return clocks.slowest(clock) >= clock


@dataclass(frozen=True, kw_only=True)
class SyncConsistency(Consistency):
    """A step is the mean of the gradients of `workers` workers, all taken at the same x.

    Attributes:
        workers: W.
        backup_workers: b: of the W + b workers the first W of each step count.
    """

    kind = "sync"
    merges = True

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

    def check_capacity(self, gradient_bytes: int, config: ServerConfig) -> None:
        """See Consistency. All gradients of a step are in memory at the same time."""
        wanted = self.workers * gradient_bytes
        if self.workers > 1 and wanted > config.max_optimizer_staged_bytes:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"The gradients of {self.workers} workers take {wanted} bytes at a time; this server allows "
                f"{config.max_optimizer_staged_bytes} (max_optimizer_staged_bytes).",
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
        """See Consistency. All gradients of a step are taken at the same x."""
        if taken_at != step:
            raise refusals.gradient_late(name, step, taken_at)

    def check_alike(self, selection: Selection, others: Iterable[Selection]) -> None:
        """See Consistency."""
        # The gradients that have arrived have the same selection, so one comparison is enough.
        if next(iter(others), selection) != selection:
            raise OptserveError(
                Reason.INVALID_FIELD,
                "All gradients of one step must be of the same parameters; those of other workers are of other ones.",
                field="tensors",
            )

    def may_apply(self, clock: int, arrived: int, clocks: WorkerClocks) -> bool:  # noqa: ARG002
        """Once W gradients have arrived."""
        return arrived >= self.workers

    def contributors(self, worker: _Worker, arrived: Collection[_Worker]) -> Collection[_Worker]:  # noqa: ARG002
        """All workers whose gradients have arrived."""
        return arrived

    def merge(self, payload: Payload, gradients: Sequence[Gradient], make_buffer: Callable[[], Staging]) -> Gradient:
        """Their mean."""
        return merge(payload, gradients, make_buffer())

    def may_wake_others(self, clock: int, clocks: WorkerClocks) -> bool:  # noqa: ARG002
        """Always: the other contributors wait for the step."""
        return True


CONSISTENCIES: dict[str, type[Consistency]] = {
    kind.kind: kind for kind in (AsyncConsistency, BoundedConsistency, SyncConsistency)
}
"""Every kind by its name in the contract."""
