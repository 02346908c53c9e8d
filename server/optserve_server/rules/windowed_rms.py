"""A decaying window of squared gradients, the paper's "idea 1": equations 8 to 10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optserve_server.rules.base import Rule, hyperparameter


@dataclass(frozen=True)
class WindowedRms(Rule):
    """E[g²] ← ρ E[g²] + (1−ρ) g²;  Δx = −η g / RMS[g],  RMS[g] = √(E[g²] + ε).

    torch.optim.RMSprop adds ε outside the root; the two agree as ε goes to 0.
    """

    name = "windowed_rms"
    slots = ("square_avg",)
    squares_gradient = True

    learning_rate: float = hyperparameter(0.01, "[0, inf)")
    rho: float = hyperparameter(0.9, "[0, 1)")
    eps: float = hyperparameter(1e-6, "(0, inf)")

    def scalars(self) -> tuple[float, ...]:
        """ρ, 1−ρ, ε, −η."""
        return self.rho, 1.0 - self.rho, self.eps, -self.learning_rate

    @staticmethod
    def update(
        sqrt: Any, g: Any, square_avg: Any, rho: Any, one_minus_rho: Any, eps: Any, minus_learning_rate: Any
    ) -> Any:
        """Equations 8 to 10."""
        square_avg = rho * square_avg + one_minus_rho * (g * g)
        return minus_learning_rate * g / sqrt(square_avg + eps), square_avg
