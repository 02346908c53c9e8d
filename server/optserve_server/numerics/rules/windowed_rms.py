"""A decaying window of squared gradients, the paper's "idea 1": equations 8 to 10."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class WindowedRms(contract.WindowedRms):
    """E[g²] ← ρ E[g²] + (1−ρ) g²;  Δx = −η g / RMS[g],  RMS[g] = √(E[g²] + ε) + ε_outer.

    The paper has ε alone. torch.optim.RMSprop has ε_outer alone, and is this rule with eps=0.
    """

    slots = ("square_avg",)
    squares_gradient = True
    gradient_square_slot = "square_avg"

    def check(self, dtype: np.dtype) -> None:
        """As for every rule; besides, one of the two constants must be positive."""
        super().check(dtype)
        if dtype.type(self.eps) == 0 and dtype.type(self.outer_eps) == 0:
            raise self.out_of_range(
                "eps",
                f"is {self.eps!r} and outer_eps {self.outer_eps!r}, both 0 in {dtype.name}; one must be positive",
            )

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """ρ, 1−ρ, ε, ε_outer, −η."""
        return self.rho, 1.0 - self.rho, self.eps, self.outer_eps, -self.learning_rate

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. E[g²] is at least (1−ρ) g²."""
        numbers, gradient, slots = given.numbers, given.gradient, given.slots
        _, one_minus_rho, eps, outer_eps, rate = scalars
        square_avg = max(slots[0][1], gradient * gradient)
        floor = math.sqrt(eps) + outer_eps
        update = min(-rate * gradient / floor, -rate * (numbers.steepest(floor) / math.sqrt(one_minus_rho)))
        whole = max(-rate * gradient, square_avg + eps) <= numbers.most
        return update if whole else math.inf, ((0.0, square_avg),)

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η / RMS[g]."""
        return self.learning_rate / (np.sqrt(slots["square_avg"] + self.eps) + self.outer_eps)

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,
        g: Any,
        square_avg: Any,
        rho: Any,
        one_minus_rho: Any,
        eps: Any,
        outer_eps: Any,
        minus_learning_rate: Any,
    ) -> Any:
        """Equations 8 to 10; adding an ε of 0 changes no bit."""
        square_avg = rho * square_avg + one_minus_rho * (g * g)
        return minus_learning_rate * g / (sqrt(square_avg + eps) + outer_eps), square_avg
