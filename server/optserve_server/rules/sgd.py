"""Plain gradient descent: equation 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optserve_server.rules.base import Rule, hyperparameter


@dataclass(frozen=True)
class Sgd(Rule):
    """Δx = −η g."""

    name = "sgd"
    slots = ()
    squares_gradient = False

    learning_rate: float = hyperparameter(0.01, "[0, inf)")

    def scalars(self) -> tuple[float, ...]:
        """−η."""
        return (-self.learning_rate,)

    @staticmethod
    def update(sqrt: Any, g: Any, minus_learning_rate: Any) -> Any:  # noqa: ARG004 - every rule is given a root
        """Equation 2."""
        return minus_learning_rate * g
