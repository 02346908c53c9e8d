"""Gradient descent with momentum: equation 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class Momentum(contract.Momentum):
    """Δx_t = ρ Δx_{t−1} − η g_t.

    torch.optim.SGD keeps Δx / −η instead. The two agree while the learning rate is constant; when it changes, here
    the past updates keep their size, as in the paper.
    """

    slots = ("momentum",)
    signed_slots = ("momentum",)
    squares_gradient = False

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """ρ, η."""
        return self.rho, self.learning_rate

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule."""
        gradient, slots, steps = given.gradient, given.slots, given.steps
        momentum = max(-slots[0][0], slots[0][1]) + steps * (scalars[1] * gradient)
        return momentum, ((-momentum, momentum),)

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η."""
        return self.learning_rate

    @staticmethod
    def update(sqrt: Any, g: Any, momentum: Any, rho: Any, learning_rate: Any) -> Any:  # noqa: ARG004
        """Equation 4."""
        momentum = rho * momentum - learning_rate * g
        return momentum, momentum
