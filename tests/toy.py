"""A toy method, of a formula alone: sign descent with momentum, whose rate falls with the steps of each parameter."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from optserve_server.numerics.rules.base import Rule, hyperparameter

_TINY = 1e-30


@dataclass(frozen=True)
class SignDescent(Rule):
    """m ← β m + (1 − β) g;  Δx = −(η / √t) sign(m), where t counts the steps of a parameter, from 1 on."""

    name = "sign_descent"
    slots = ("momentum",)
    signed_slots = ("momentum",)
    squares_gradient = False
    counts_steps = True

    learning_rate: float = hyperparameter(0.1, "[0, inf)")
    beta: float = hyperparameter(0.9, "[0, 1)")

    def scalars(self, step: int) -> tuple[float, ...]:
        """η / √t, β, 1 − β, and a number that keeps out 0 / 0."""
        return self.learning_rate / step**0.5, self.beta, 1.0 - self.beta, _TINY

    @classmethod
    def bounds(cls, given, scalars):
        """The rate is largest in the first step."""
        momentum = max(-given.slots[0][0], given.slots[0][1], given.gradient)
        return scalars[0], ((-momentum, momentum),)

    @staticmethod
    def update(sqrt: Any, g: Any, momentum: Any, rate: Any, beta: Any, one_minus_beta: Any, tiny: Any) -> Any:
        """The sign is m / |m|."""
        momentum = beta * momentum + one_minus_beta * g
        return -(rate * (momentum / (abs(momentum) + tiny))), momentum


def sign_descent(rule: SignDescent, gradients: list[np.ndarray | None]) -> np.ndarray:
    """The sum of all updates of one parameter in float64; None is a step that it takes no part in."""
    given = [g.astype(np.float64) for g in gradients if g is not None]
    x = momentum = np.zeros_like(given[0])
    for turn, g in enumerate(given):
        momentum = rule.beta * momentum + (1 - rule.beta) * g
        x = x - rule.learning_rate / np.sqrt(turn + 1) * np.sign(momentum)
    return x
