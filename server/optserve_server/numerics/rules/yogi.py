"""Yogi: Zaheer et al., "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018, Algorithm 2."""

from __future__ import annotations

from typing import Any

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Interval, Scalars
from optserve_server.numerics.rules.moments import CorrectableMoments, Weights


class Yogi(CorrectableMoments, contract.Yogi):
    """m ← β1 m + (1−β1) g;  v ← v − (1−β2) sign(v − g²) g²;  Δx = −η m / (√v + ε), or with m̂ and v̂ as in Adam.

    v stays at 0 at least: what is taken off is a part of g², and g² is less than v then.
    """

    gradient_square_slot = None
    needs_tiny = True

    @classmethod
    def weights(cls, scalars: Scalars) -> Weights:
        """See Moments. v keeps at least β2 of itself, if rounding leaves some of it, and so of a smaller g²."""
        beta1, one_minus_beta1, beta2, one_minus_beta2 = scalars[:4]
        kept, share = (beta2, one_minus_beta2) if beta2 >= 0.5 else (0.0, 0.0)
        return Weights(beta1, one_minus_beta1, kept, share)

    @classmethod
    def largest_square(cls, gradient: float, square_avg: Interval, scalars: Scalars) -> float:
        """See Moments. Only a v below g² grows."""
        return max(square_avg[1], (1.0 + scalars[3]) * (gradient * gradient))

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,
        g: Any,
        grad_avg: Any,
        square_avg: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,  # noqa: ARG004
        one_minus_beta2: Any,
        correction: Any,
        root_correction: Any,
        eps: Any,
        minus_learning_rate: Any,
        tiny: Any,
    ) -> Any:
        """The sign is made as in `lion.py`."""
        grad_avg = beta1 * grad_avg + one_minus_beta1 * g
        square = g * g
        difference = square_avg - square
        near = difference / (abs(difference) + tiny)
        sign = near / (abs(near) + tiny)
        square_avg = square_avg - one_minus_beta2 * (sign * square)
        quotient = grad_avg * correction / (sqrt(square_avg) * root_correction + eps)
        return minus_learning_rate * quotient, grad_avg, square_avg
