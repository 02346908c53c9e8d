"""How the gradients of several workers on one optimizer come together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optserve_server.errors import OptserveError, Reason

LEASE_S = 30.0
MAX_WORKERS = 4096
"""Most that one step can need."""
BLOCK = 1 << 16
"""Elements of a mean that are scaled at a time."""


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


def mean(parts: Sequence[np.ndarray], target: np.ndarray, largest: float) -> None:
    """The mean of several workers' gradients, summed in the order in which they are given.

    Where the sum could be beyond the dtype, which the mean never is, it is taken in a smaller unit, a power of two: the
    same bits, but for elements so small that they lose digits by that.

    Args:
        parts: One array for each worker.
        target: Takes the mean.
        largest: No element of the parts has a larger magnitude.
    """
    count = target.dtype.type(len(parts))
    if len(parts) * largest <= float(np.finfo(target.dtype).max) / 2:
        target[...] = parts[0]
        for part in parts[1:]:
            np.add(target, part, out=target)
        np.divide(target, count, out=target)
        return
    unit = target.dtype.type(math.ldexp(1.0, -math.ceil(math.log2(len(parts))) - 1))
    for start in range(0, target.size, BLOCK):
        block = slice(start, start + BLOCK)
        total = target[block]
        np.multiply(parts[0][block], unit, out=total)
        for part in parts[1:]:
            np.add(total, part[block] * unit, out=total)
        np.divide(total, count, out=total)
        # By rounding alone, the mean of equal numbers can be larger than these.
        with np.errstate(over="ignore"):
            np.divide(total, unit, out=total)
        np.clip(total, -target.dtype.type(largest), target.dtype.type(largest), out=total)
