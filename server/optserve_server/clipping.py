"""Bounds on the gradient of a step, applied before the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optserve_server.errors import OptserveError, Reason
from optserve_server.layout import Payload

BLOCK = 1 << 16
"""Elements whose squares are summed at a time, in float64. The order is fixed, so that the sum is always the same."""


@dataclass(frozen=True)
class Clipping:
    """A bound.

    Attributes:
        kind: `value`: of every element; `norm`: of every tensor's Euclidean norm; `global_norm`: of the norm over all
            tensors of the step.
        bound: Positive.
    """

    kind: str
    bound: float

    def check(self) -> None:
        """Raise HYPERPARAMETER_OUT_OF_RANGE unless the bound is a positive number."""
        if not (0 < self.bound < math.inf and float(np.float32(self.bound)) > 0):
            raise OptserveError(
                Reason.HYPERPARAMETER_OUT_OF_RANGE,
                f"The bound of clipping is {self.bound!r}, but must lie in (0, inf).",
                field=f"optimizer.clipping.{self.kind}",
            )

    def clip(self, payload: Payload, gradients: Sequence[np.ndarray]) -> float | None:
        """Keep a step's gradient within the bound, in place.

        Args:
            payload: Says which tensors take part.
            gradients: Theirs, run by run.

        Returns:
            The norm over all tensors of the step before clipping; None where it was not needed.
        """
        if self.kind == "value":
            for gradient in gradients:
                bound = gradient.dtype.type(self.bound)
                np.clip(gradient, -bound, bound, out=gradient)
            return None
        tensors = _tensors(payload, gradients)
        norms = [_norm(tensor) for tensor in tensors]
        total = math.hypot(*norms)
        for tensor, own in zip(tensors, norms, strict=True):
            norm = total if self.kind == "global_norm" else own
            if norm > self.bound:
                np.multiply(tensor, tensor.dtype.type(self.bound / norm), out=tensor)
        return total


def _tensors(payload: Payload, gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The part of each tensor that takes part, in the order of the payload."""
    parts = []
    for run, gradient in zip(payload.runs, gradients, strict=True):
        for index in payload.tensors_of(run):
            start = payload.layout.starts[index] - run.start
            parts.append(gradient[start : start + payload.layout.parameters[index].size])
    return parts


def _norm(array: np.ndarray) -> float:
    """The Euclidean norm."""
    norm = math.sqrt(_sum_of_squares(array, 1.0))
    if math.isfinite(norm):
        return norm
    # The squares are beyond float64, which the norm itself need not be.
    largest = float(np.abs(array).max())
    return largest * math.sqrt(_sum_of_squares(array, largest))


def _sum_of_squares(array: np.ndarray, unit: float) -> float:
    """That of the elements in a unit. Not fsum, which raises where the sum is infinite."""
    blocks = (array[start : start + BLOCK].astype(np.float64) for start in range(0, array.size, BLOCK))
    with np.errstate(over="ignore"):
        return sum(float(np.square(block / unit).sum()) for block in blocks)
