"""Bounds on the gradient of a step, applied before the method."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.layout import Largest, Operand, Payload

BLOCK = 1 << 16
"""Elements whose squares are summed at once, in float64. The order is fixed, so that the sum is always the same."""

_MOST = float(np.finfo(np.float64).max)


class _Norm(NamedTuple):
    """The norm unit * ratio. Both factors are finite; their product may be infinite."""

    unit: float
    ratio: float

    @property
    def value(self) -> float:
        """The norm; infinite where it is beyond float64."""
        return self.unit * self.ratio


class _Scaled(NamedTuple):
    """A part of a run that is divided by `divisor`, a power of two, and then multiplied by `factor`."""

    start: int
    stop: int
    divisor: float
    factor: float


@dataclass(frozen=True)
class Clip:
    """What clipping does to the gradient of one step.

    Attributes:
        norm: The norm over all tensors of the step before clipping, at most the largest float64; None if not needed.
        bound: Largest magnitude of an element after clipping, up to rounding.
        by_value: Whether each element is clipped by itself.
        scaled: Otherwise, the parts of each run that are scaled down.
    """

    norm: float | None
    bound: float
    by_value: bool
    scaled: Sequence[Sequence[_Scaled]] = ()

    def changes(self, gradients: Sequence[np.ndarray], largest: Largest, *, is_exact: bool) -> bool:
        """Whether it changes the gradient.

        Args:
            gradients: See `Clipping.measure`.
            largest: The largest magnitudes of the operands.
            is_exact: Whether they are exact; otherwise they may be too large.
        """
        if not self.by_value:
            return any(self.scaled)
        beyond = {
            dtype for (operand, dtype), value in largest.items()
            if operand is Operand.GRADIENT and value > _bound_in(dtype, self.bound)
        }  # fmt: skip
        if is_exact or not beyond:
            return bool(beyond)
        return any(bool((np.abs(part) > _bound_in(part.dtype, self.bound)).any()) for part in gradients)

    def apply(self, run_number: int, start: int, gradient: np.ndarray) -> None:
        """Clip, in place, a part of one run of the payload, from the run's element `start` on."""
        if self.by_value:
            bound = _bound_in(gradient.dtype, self.bound)
            np.clip(gradient, -bound, bound, out=gradient)
            return
        for scaled in self.scaled[run_number]:
            low, high = max(scaled.start - start, 0), min(scaled.stop - start, gradient.size)
            if low < high:
                part = gradient[low:high]
                if scaled.divisor != 1:
                    np.divide(part, part.dtype.type(scaled.divisor), out=part)
                np.multiply(part, part.dtype.type(scaled.factor), out=part)

    def for_parts(self, parts: Iterable[tuple[int, int, int]]) -> Clip:
        """The same clipping for some parts of the runs, each of which then counts as a run.

        Args:
            parts: (number of the run, first element in it, element after the last) of each part.
        """
        return self if self.by_value else replace(self, scaled=[self._scaled_in(*part) for part in parts])

    def _scaled_in(self, run_number: int, start: int, stop: int) -> list[_Scaled]:
        """The scaled parts within a part of a run, counted from its first element."""
        found: list[_Scaled] = []
        of_run = self.scaled[run_number]
        # Found by bisection, because a run may have many scaled parts, and may be divided into many parts.
        for position in range(bisect_right(of_run, start, key=lambda s: s.stop), len(of_run)):
            scaled = of_run[position]
            if scaled.start >= stop:
                break
            found.append(scaled._replace(start=scaled.start - start, stop=scaled.stop - start))
        return found


CLIPPINGS = ("value", "norm", "global_norm")
"""The kinds of clipping."""


@dataclass(frozen=True)
class Clipping:
    """The clipping of gradients.

    Attributes:
        kind: What the bound limits. `value`: every element; `norm`: the Euclidean norm of every tensor; `global_norm`:
            the Euclidean norm over all tensors of the step.
        bound: The bound, positive.
    """

    kind: str
    bound: float

    def check(self) -> None:
        """Raise HYPERPARAMETER_OUT_OF_RANGE unless the bound is a positive number."""
        # The smallest bound is half of float32's smallest number, to which it is rounded.
        if not (0 < self.bound < math.inf and float(np.float32(min(self.bound, 1.0))) > 0):
            raise OptserveError(
                Reason.HYPERPARAMETER_OUT_OF_RANGE,
                f"The bound of clipping is {self.bound!r}, but must lie in (0, inf).",
                field=f"optimizer.clipping.{self.kind}",
            )

    def measure(self, payload: Payload, gradients: Sequence[np.ndarray]) -> Clip:
        """Compute the clipping of a step's gradient, without applying it.

        Args:
            payload: The parameters of the step.
            gradients: Finite arrays, one for each run of the payload.
        """
        if self.kind == "value":
            return Clip(None, self.bound, True)
        tensors = list(_tensors(payload, gradients))
        norms = [_norm(gradients[run_number][start:stop]) for run_number, start, stop in tensors]
        total = _norm_of_norms(norms)
        scaled: list[list[_Scaled]] = [[] for _ in gradients]
        for (run_number, start, stop), own in zip(tensors, norms, strict=True):
            norm = total if self.kind == "global_norm" else own
            if norm.value > self.bound:
                scaled[run_number].append(
                    _Scaled(start, stop, *_factors(self.bound, norm, gradients[run_number].dtype))
                )
        return Clip(min(total.value, _MOST), self.bound, False, scaled)


def gradient_norm(payload: Payload, gradients: Sequence[np.ndarray]) -> float:
    """The Euclidean norm over all tensors of a step, at most the largest float64; see `Clipping.measure`."""
    norms = [_norm(gradients[run_number][start:stop]) for run_number, start, stop in _tensors(payload, gradients)]
    return min(_norm_of_norms(norms).value, _MOST)


def _bound_in(dtype: np.dtype, bound: float) -> np.floating:
    """The bound of clipping by value, rounded to a dtype."""
    return dtype.type(min(bound, float(np.finfo(dtype).max)))


def _tensors(payload: Payload, gradients: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int]]:
    """(number of the run, first element in it, element after the last) of each tensor, in the order of the payload.

    Those without elements are left out: where a run begins, one may be of another dtype, and lie nowhere in the run.
    """
    for run_number, run in enumerate(payload.runs[: len(gradients)]):
        for index in payload.tensors_of(run):
            start, size = payload.layout.starts[index] - run.start, payload.layout.parameters[index].size
            if size:
                yield run_number, start, start + size


def _factors(bound: float, norm: _Norm, dtype: np.dtype) -> tuple[float, float]:
    """(power of two to divide by, factor) that bring a norm down to the bound.

    The power is 1 if the dtype can hold the factor with all its digits.
    """
    factor = bound / norm.value
    if factor >= float(np.finfo(dtype).tiny):
        return 1.0, factor
    reach = min(norm.value, float(np.finfo(dtype).max))
    divisor = math.ldexp(1.0, math.frexp(reach)[1] - 1)
    return divisor, bound / (norm.unit / divisor * norm.ratio)


def _norm_of_norms(norms: Sequence[_Norm]) -> _Norm:
    """The norm over all tensors."""
    total = math.hypot(*(norm.value for norm in norms))
    if math.isfinite(total):
        return _Norm(1.0, total)
    unit = max(norm.value if math.isfinite(norm.value) else norm.unit for norm in norms)
    return _Norm(unit, math.hypot(*(norm.unit / unit * norm.ratio for norm in norms)))


def _norm(array: np.ndarray) -> _Norm:
    """The Euclidean norm."""
    norm = math.sqrt(_sum_of_squares(array, 1.0))
    if math.isfinite(norm):
        # Squares of very small elements vanish, but no bound is as small as the norm of these.
        return _Norm(1.0, norm)
    # The squares overflow float64; the norm itself may not.
    largest = float(np.abs(array).max())
    return _Norm(largest, math.sqrt(_sum_of_squares(array, largest)))


def _sum_of_squares(array: np.ndarray, unit: float) -> float:
    """The sum of the squares of element / unit. Not by fsum, which raises if the sum is infinite."""
    blocks = (array[start : start + BLOCK].astype(np.float64) for start in range(0, array.size, BLOCK))
    with np.errstate(over="ignore"):
        return sum(float(np.square(block / unit).sum()) for block in blocks)
