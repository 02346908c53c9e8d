"""Centred RMSprop with momentum as torch has it: Graves, arXiv:1308.0850, equations 38 to 45."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars, squares_overflow
from optserve_server.numerics.rules.rmsprop import sum_of_quotients


class CenteredRmsprop(contract.CenteredRmsprop):
    """b ← μ b + g / (√max(E[g²] − E[g]², 0) + ε);  Δx = −η b.

    Where gradients hardly change, rounding can leave E[g²] − E[g]² a little below 0. Its root is then 0 here, and
    ε keeps the quotient finite; in torch it is NaN.
    """

    slots = ("square_avg", "momentum_buffer", "grad_avg")
    signed_slots = ("momentum_buffer", "grad_avg")
    squares_gradient = True
    gradient_square_slot = "square_avg"
    eps_in_root = False

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """ρ, 1−ρ, ε, μ, −η, 1/2."""
        return self.rho, 1.0 - self.rho, self.eps, self.momentum, -self.learning_rate, 0.5

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. The root may be 0 for any g."""
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        eps, momentum, rate = scalars[2:5]
        grad_avg = max(-slots[2][0], slots[2][1], gradient)
        square_avg = max(slots[0][1], gradient * gradient)
        buffer = sum_of_quotients(slots[1], gradient / eps, momentum, steps)
        whole = max(square_avg, grad_avg * grad_avg, buffer) <= numbers.most
        after = (0.0, square_avg), (-buffer, buffer), (-grad_avg, grad_avg)
        return -rate * buffer if whole else math.inf, after

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η / (√max(E[g²] − E[g]², 0) + ε)."""
        variance = np.maximum(slots["square_avg"] - slots["grad_avg"] ** 2, 0.0)
        return self.learning_rate / (np.sqrt(variance) + self.eps)

    def unreachable_values(self, slot: str, values: np.ndarray) -> np.ndarray | None:
        """E[g] is a mean of gradients whose squares are finite. Were its own not, every step would be refused."""
        return squares_overflow(values) if slot == "grad_avg" else None

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,
        g: Any,
        square_avg: Any,
        momentum_buffer: Any,
        grad_avg: Any,
        rho: Any,
        one_minus_rho: Any,
        eps: Any,
        momentum: Any,
        minus_learning_rate: Any,
        half: Any,
    ) -> Any:
        """max(y, 0) is y / 2 + |y| / 2, halves first, so that the sum is finite."""
        square_avg = rho * square_avg + one_minus_rho * (g * g)
        grad_avg = rho * grad_avg + one_minus_rho * g
        variance = half * (square_avg - grad_avg * grad_avg)
        quotient = g / (sqrt(variance + abs(variance)) + eps)
        momentum_buffer = momentum * momentum_buffer + quotient
        return minus_learning_rate * momentum_buffer, square_avg, momentum_buffer, grad_avg
