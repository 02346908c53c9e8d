"""The diagonal Hessian method of Becker and LeCun (1988): equation 6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class DiagonalHessian(contract.DiagonalHessian):
    """Δx = −η g / (|h| + μ), h = diag(H).

    h may be of either sign or 0; μ keeps the quotient finite.
    """

    slots = ()
    squares_gradient = False

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """−η, μ and 1, each times a power of two by which η becomes at most 1.

        So η g is finite wherever g is. A power of two changes no digit, unless something is so small that it has not
        all its digits any more; so μ limits it.
        """
        exponent = math.frexp(self.learning_rate)[1] if self.learning_rate > 1 else 0
        unit = math.ldexp(1.0, -max(0, min(exponent, math.frexp(self.mu)[1] + 125)))
        return -self.learning_rate * unit, self.mu * unit, unit

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. μ may be as small as what rounding adds to η g."""
        numbers, gradient, curvature = given.numbers, given.gradient, given.curvature
        rate, mu, unit = scalars
        numerator = -rate * gradient + numbers.least
        whole = max(numerator, curvature * unit + mu) <= numbers.most
        return numerator / mu if whole else math.inf, ()

    @staticmethod
    def update(sqrt: Any, g: Any, h: Any, minus_learning_rate: Any, mu: Any, unit: Any) -> Any:  # noqa: ARG004
        """Equation 6."""
        return minus_learning_rate * g / (abs(h) * unit + mu)
