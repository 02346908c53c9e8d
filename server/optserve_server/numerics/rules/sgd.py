"""Plain gradient descent: equation 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class Sgd(contract.Sgd):
    """Δx = −η g."""

    slots = ()
    squares_gradient = False

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """−η."""
        return (-self.learning_rate,)

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule."""
        return abs(scalars[0]) * given.gradient, ()

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η."""
        return self.learning_rate

    @staticmethod
    def update(sqrt: Any, g: Any, minus_learning_rate: Any) -> Any:  # noqa: ARG004 - every rule is given a root
        """Equation 2."""
        return minus_learning_rate * g
