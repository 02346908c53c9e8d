"""How the gradients of several workers on one optimizer come together."""

from __future__ import annotations

from dataclasses import dataclass

from optserve_server.domain.errors import OptserveError, Reason

CONSISTENCIES = ("async", "bounded", "sync")
"""The kinds of it."""

LEASE_S = 30.0
MAX_WORKERS = 4096
"""Most that one step can need."""


@dataclass(frozen=True)
class Consistency:
    """One of three kinds.

    Attributes:
        kind: `async`: applied in the order of arrival. `bounded`: likewise, but a worker that has made more than
            `staleness` steps more than the slowest live one waits. `sync`: a step is the mean of the gradients of
            `workers` workers, all taken at the same x.
        staleness: In steps of a worker.
        workers: W.
        backup_workers: b: of the W + b workers the first W of each step count.
        lease_s: How long a worker lives after its last report.
        scale_by_staleness: Divide the learning rate by 1 + the steps applied since the x that the gradient was taken
            at (Zhang et al., arXiv:1511.05950). Not the gradient: most rules would scale that up again.
    """

    kind: str
    staleness: int = 0
    workers: int = 0
    backup_workers: int = 0
    lease_s: float = LEASE_S
    scale_by_staleness: bool = False

    @property
    def waits(self) -> bool:
        """Whether a worker's commit may wait for other workers."""
        return self.kind != "async"

    def check(self) -> None:
        """Raise INVALID_FIELD for impossible values."""
        if self.kind == "sync" and not 1 <= self.workers <= MAX_WORKERS:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"A step takes the gradients of 1 to {MAX_WORKERS} workers, not of {self.workers}.",
                field="optimizer.consistency.sync.workers",
            )
        if not 1 <= self.lease_s <= 3600:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"A lease lasts 1 s to an hour, not {self.lease_s:g} s.",
                field="optimizer.consistency.lease",
            )
