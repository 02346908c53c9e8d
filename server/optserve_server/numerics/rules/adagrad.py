"""ADAGRAD: equation 5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class Adagrad(contract.Adagrad):
    """Δx = −η g / (√(Σ g²) + ε).

    Equation 5 has no ε and is 0 / 0 where every gradient so far was 0. ε stands outside the root, as in
    torch.optim.Adagrad.
    """

    slots = ("sum",)
    squares_gradient = True

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """−η, ε."""
        return -self.learning_rate, self.eps

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. Σ g² is at least g²."""
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        rate, eps = abs(scalars[0]), scalars[1]
        total = slots[0][1] + steps * (gradient * gradient)
        whole = rate * gradient <= numbers.most and total <= numbers.most
        update = min(rate * gradient / eps, rate * numbers.steepest(eps))
        return update if whole else math.inf, ((0.0, total),)

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η / (√(Σ g²) + ε)."""
        return self.learning_rate / (np.sqrt(slots["sum"]) + self.eps)

    @staticmethod
    def update(sqrt: Any, g: Any, total: Any, minus_learning_rate: Any, eps: Any) -> Any:
        """Equation 5."""
        total = total + g * g
        return minus_learning_rate * g / (sqrt(total) + eps), total
