"""The mean of the gradients of several workers, which are applied as one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from optserve_server.numerics.layout import Largest, Payload

if TYPE_CHECKING:
    from optserve_server.numerics.staging import Staging

BLOCK = 1 << 16
"""Elements of a mean that are scaled at once."""


class Gradient(NamedTuple):
    """The operands of one step, or the mean of those of several workers.

    Attributes:
        staging: The buffer that holds them.
        largest: The largest magnitude of each operand.
    """

    staging: Staging
    largest: Largest


def merge(payload: Payload, gradients: Sequence[Gradient], target: Staging) -> Gradient:
    """Put the mean of the operands of several steps into a buffer.

    Args:
        payload: The parameters, the same for all gradients.
        gradients: In an order that does not depend on the order of arrival.
        target: The buffer for the mean.
    """
    largest = {key: max(gradient.largest[key] for gradient in gradients) for key in gradients[0].largest}
    for operand, arenas in target.operands.items():
        for run_number, part in enumerate(payload.parts(arenas)):
            parts = [payload.parts(gradient.staging.operands[operand])[run_number] for gradient in gradients]
            mean(parts, part, largest[operand, part.dtype])
    # Rounding can make the mean a little larger than all of its parts.
    return Gradient(target, {key: 1.001 * value for key, value in largest.items()})


def mean(parts: Sequence[np.ndarray], target: np.ndarray, largest: float) -> None:
    """The mean of several workers' gradients, summed in the given order.

    If the sum could overflow, it is computed in a smaller unit, a power of two. This gives the same bits, except for
    elements that are so small that they lose digits in that unit.

    Args:
        parts: One flat array for each worker.
        target: The array for the mean.
        largest: The largest magnitude of any element.
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
