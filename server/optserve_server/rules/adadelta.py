"""ADADELTA: Zeiler, arXiv:1212.5701, Algorithm 1 and equation 14."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optserve_server.rules.base import Rule, hyperparameter


@dataclass(frozen=True)
class Adadelta(Rule):
    """E[g²] ← ρ E[g²] + (1−ρ) g²;  Δx ← −(RMS[Δx] / RMS[g]) g;  E[Δx²] ← ρ E[Δx²] + (1−ρ) Δx²."""

    name = "adadelta"
    slots = ("square_avg", "acc_delta")
    squares_gradient = True
    gradient_square_slot = "square_avg"
    update_square_slot = "acc_delta"

    rho: float = hyperparameter(0.95, "[0, 1)")
    eps: float = hyperparameter(1e-6, "(0, inf)")
    learning_rate: float = hyperparameter(1.0, "[0, inf)")

    def scalars(self) -> tuple[float, ...]:
        """ρ, 1−ρ, ε, learning rate."""
        return self.rho, 1.0 - self.rho, self.eps, self.learning_rate

    def effective_rate(self, slots: Mapping[str, np.ndarray]) -> Any:
        """RMS[Δx] / RMS[g], times the learning rate."""
        return self.learning_rate * np.sqrt((slots["acc_delta"] + self.eps) / (slots["square_avg"] + self.eps))

    @staticmethod
    def update(
        sqrt: Any, g: Any, square_avg: Any, acc_delta: Any, rho: Any, one_minus_rho: Any, eps: Any, learning_rate: Any
    ) -> Any:
        """Algorithm 1, lines 4 to 6; the learning rate multiplies Δx after line 6, as in torch and optax."""
        square_avg = rho * square_avg + one_minus_rho * (g * g)
        delta = -(sqrt(acc_delta + eps) / sqrt(square_avg + eps)) * g
        acc_delta = rho * acc_delta + one_minus_rho * (delta * delta)
        return learning_rate * delta, square_avg, acc_delta
