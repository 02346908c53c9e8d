"""What is measured of a step's gradient before the step is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optserve_server.numerics.clipping import Clip, gradient_norm
from optserve_server.numerics.layout import Largest, Operand, Payload
from optserve_server.numerics.settings import Settings

_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


class Prepared(NamedTuple):
    """What `State.prepare` has found about a step.

    Attributes:
        clip: How clipping changes the gradient; None without clipping.
        covered: Whether bounds alone show that the step leaves everything finite.
        norm: The Euclidean norm of the gradient over all tensors, before clipping; None if nobody needs it.
        clipped: Whether clipping changes the gradient; None without clipping.
    """

    clip: Clip | None
    covered: bool
    norm: float | None = None
    clipped: bool | None = None


COVERED = Prepared(None, True)
UNCOVERED = Prepared(None, False)


class Measured(NamedTuple):
    """A gradient that was measured.

    Attributes:
        clip: See Prepared.
        largest: The largest magnitudes of the operands, after clipping.
        norm: See Prepared.
        clipped: See Prepared.
    """

    clip: Clip | None
    largest: Largest
    norm: float | None
    clipped: bool | None


def measure(
    settings: Settings, payload: Payload, gradients: Sequence[np.ndarray], largest: Largest, *, with_norm: bool
) -> Measured:
    """Measure the gradient of a step, and how it is clipped.

    Args:
        settings: The optimizer's.
        payload: The parameters that take part.
        gradients: Finite arrays, one for each run of the payload.
        largest: The largest magnitudes of the operands.
        with_norm: Whether the norm is needed, also if clipping does not need it.
    """
    if settings.clipping is None:
        return Measured(None, largest, gradient_norm(payload, gradients) if with_norm else None, None)
    clip = settings.clipping.measure(payload, gradients)
    # Rounding may make a value a little larger than the bound; among the smallest numbers, up to twice as large.
    bound = 1.001 * clip.bound + _SMALLEST
    after = {
        (operand, dtype): min(value, bound) if operand is Operand.GRADIENT else value
        for (operand, dtype), value in largest.items()
    }
    norm = gradient_norm(payload, gradients) if with_norm and clip.norm is None else clip.norm
    # Of a mean only a bound of the largest magnitude is known.
    is_exact = settings.consistency is None or not settings.consistency.merges
    return Measured(clip, after, norm, clip.changes(gradients, largest, is_exact=is_exact))
