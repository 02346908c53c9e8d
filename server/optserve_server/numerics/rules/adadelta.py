"""ADADELTA: Zeiler, arXiv:1212.5701, Algorithm 1 and equation 14."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class Adadelta(contract.Adadelta):
    """E[g²] ← ρ E[g²] + (1−ρ) g²;  Δx ← −(RMS[Δx] / RMS[g]) g;  E[Δx²] ← ρ E[Δx²] + (1−ρ) Δx²."""

    slots = ("square_avg", "acc_delta")
    squares_gradient = True
    gradient_square_slot = "square_avg"
    update_square_slot = "acc_delta"

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """ρ, 1−ρ, ε, learning rate."""
        return self.rho, 1.0 - self.rho, self.eps, self.learning_rate

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. E[g²] is at least (1−ρ) g², so |Δx| is at most RMS[Δx] / √(1−ρ), whatever g is.

        With q the largest |g| / RMS[g], E[Δx²] + ε becomes at most 1 + (1−ρ) q² times as large in a step.
        """
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        _, one_minus_rho, eps, learning_rate = scalars
        floor = math.sqrt(eps)
        square_avg = max(slots[0][1], gradient * gradient)
        quotient = min(gradient / floor, numbers.steepest(floor) / math.sqrt(one_minus_rho))
        growth = 1.0 + one_minus_rho * (quotient * quotient)
        # A float to a large power is an error, not infinity.
        acc_delta = (slots[1][1] + eps) * (growth**steps if growth < 1e4 else growth if steps == 1 else math.inf)
        root = math.sqrt(acc_delta)
        # Not root * quotient, where the quotient may vanish.
        delta = min(root / floor * gradient, root * (numbers.steepest(floor) / math.sqrt(one_minus_rho)))
        whole = max(square_avg + eps, acc_delta, root / floor, delta * delta) <= numbers.most
        return learning_rate * delta if whole else math.inf, ((0.0, square_avg), (0.0, acc_delta))

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """RMS[Δx]_{t−1} / RMS[g]_t, times the learning rate (equation 14); without the update RMS[Δx]_t / RMS[g]_t."""
        squares, deltas = slots["square_avg"], slots["acc_delta"]
        rates = self.learning_rate * np.sqrt((deltas + self.eps) / (squares + self.eps))
        if update is None or not self.rate_needs_update:
            return rates
        if self.rho == 0:
            # Nothing is left of E[Δx²]_{t−1}, but E[g²] is the square of the last gradient, if that was not 0.
            return np.where(squares > 0, np.abs(update) / np.sqrt(squares), rates)
        delta = update / self.learning_rate
        # Line 6 of Algorithm 1 the other way round. Rounding can leave less than nothing of what was 0.
        before = np.maximum(deltas - (1.0 - self.rho) * delta * delta, 0.0) / self.rho
        return self.learning_rate * np.sqrt((before + self.eps) / (squares + self.eps))

    @property
    def rate_needs_update(self) -> bool:
        """Unless every rate is 0."""
        return self.learning_rate > 0

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any, g: Any, square_avg: Any, acc_delta: Any, rho: Any, one_minus_rho: Any, eps: Any, learning_rate: Any
    ) -> Any:
        """Algorithm 1, lines 4 to 6; the learning rate multiplies Δx after line 6, as in torch and optax."""
        square_avg = rho * square_avg + one_minus_rho * (g * g)
        delta = -(sqrt(acc_delta + eps) / sqrt(square_avg + eps)) * g
        acc_delta = rho * acc_delta + one_minus_rho * (delta * delta)
        return learning_rate * delta, square_avg, acc_delta
