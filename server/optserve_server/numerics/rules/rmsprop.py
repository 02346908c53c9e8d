"""RMSprop with momentum as torch has it: Hinton's lecture 6e, Graves arXiv:1308.0850."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


def sum_of_quotients(before: Interval, quotient: float, momentum: float, steps: int) -> float:
    """The largest magnitude of b after at most `steps` times b ← μ b + q, with q within ± `quotient`."""
    largest = max(-before[0], before[1])
    return min(largest + steps * quotient, max(largest, quotient / (1.0 - momentum)))


class Rmsprop(contract.Rmsprop):
    """E[g²] ← ρ E[g²] + (1−ρ) g²;  b ← μ b + g / (√E[g²] + ε);  Δx = −η b."""

    slots = ("square_avg", "momentum_buffer")
    signed_slots = ("momentum_buffer",)
    squares_gradient = True
    gradient_square_slot = "square_avg"
    eps_in_root = False

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """ρ, 1−ρ, ε, μ, −η."""
        return self.rho, 1.0 - self.rho, self.eps, self.momentum, -self.learning_rate

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. E[g²] is at least (1−ρ) g²."""
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        _, one_minus_rho, eps, momentum, rate = scalars
        square_avg = max(slots[0][1], gradient * gradient)
        quotient = min(gradient / eps, numbers.steepest(eps) / math.sqrt(one_minus_rho))
        buffer = sum_of_quotients(slots[1], quotient, momentum, steps)
        whole = max(square_avg, buffer) <= numbers.most
        return -rate * buffer if whole else math.inf, ((0.0, square_avg), (-buffer, buffer))

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η / (√E[g²] + ε)."""
        return self.learning_rate / (np.sqrt(slots["square_avg"]) + self.eps)

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,
        g: Any,
        square_avg: Any,
        momentum_buffer: Any,
        rho: Any,
        one_minus_rho: Any,
        eps: Any,
        momentum: Any,
        minus_learning_rate: Any,
    ) -> Any:
        """The momentum is one of quotients, so a changed learning rate is that of all of them."""
        square_avg = rho * square_avg + one_minus_rho * (g * g)
        momentum_buffer = momentum * momentum_buffer + g / (sqrt(square_avg) + eps)
        return minus_learning_rate * momentum_buffer, square_avg, momentum_buffer
