"""Plain gradient descent: equation 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None) -> Any:  # noqa: ARG002
        """η."""
        return self.learning_rate

    @staticmethod
    def update(sqrt: Any, g: Any, minus_learning_rate: Any) -> Any:  # noqa: ARG004 - every rule is given a root
        """Equation 2."""
        return minus_learning_rate * g
