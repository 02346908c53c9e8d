"""The diagonal Hessian method of Becker and LeCun (1988): equation 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optserve_server.rules.base import Rule, hyperparameter


@dataclass(frozen=True)
class DiagonalHessian(Rule):
    """Δx = −η g / (|h| + μ), h = diag(H).

    h may be of either sign or 0; μ keeps the quotient finite.
    """

    name = "diagonal_hessian"
    takes_curvature = True
    slots = ()
    squares_gradient = False

    mu: float = hyperparameter(3.0, "(0, inf)")
    learning_rate: float = hyperparameter(1.0, "[0, inf)")

    def scalars(self) -> tuple[float, ...]:
        """−η, μ."""
        return -self.learning_rate, self.mu

    @staticmethod
    def update(sqrt: Any, g: Any, h: Any, minus_learning_rate: Any, mu: Any) -> Any:  # noqa: ARG004
        """Equation 6."""
        return minus_learning_rate * g / (abs(h) + mu)
