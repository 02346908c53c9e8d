"""Gradient descent with momentum as torch has it: with dampening and Nesterov's variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class SgdMomentum(contract.SgdMomentum):
    """b ← μ b + (1−d) g, but b ← g in a parameter's first step;  Δx = −η b, or with Nesterov −η (g + μ b).

    Where μ is 0 there is no dampening either, as in torch.
    """

    slots = ("momentum_buffer",)
    signed_slots = ("momentum_buffer",)
    counts_steps = True
    squares_gradient = False

    def check(self, dtype: np.dtype) -> None:
        """As for every rule; besides, Nesterov's variant needs a momentum, and no dampening."""
        super().check(dtype)
        if self.nesterov and (dtype.type(self.momentum) == 0 or self.dampening != 0):
            raise self.out_of_range(
                "nesterov",
                f"is true, with a momentum of {self.momentum!r} and a dampening of {self.dampening!r}; it needs a "
                "positive momentum and a dampening of 0",
            )

    def scalars(self, step: int) -> tuple[float, ...]:
        """The decay of b, the weight of g in it, the shares of g and of b in the update, −η."""
        is_first = step == 1
        decay = 0.0 if is_first else self.momentum
        weight = 1.0 if is_first or self.momentum == 0 else 1.0 - self.dampening
        shares = (1.0, self.momentum) if self.nesterov else (0.0, 1.0)
        return decay, weight, *shares, -self.learning_rate

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. After the first step the decay is less than 1, and the weight of g at most that."""
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        momentum_buffer = max(-slots[0][0], slots[0][1]) + steps * gradient
        change = scalars[2] * gradient + scalars[3] * momentum_buffer
        return -scalars[4] * change if change <= numbers.most else np.inf, ((-momentum_buffer, momentum_buffer),)

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η."""
        return self.learning_rate

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,  # noqa: ARG004
        g: Any,
        momentum_buffer: Any,
        decay: Any,
        weight: Any,
        share: Any,
        buffer_share: Any,
        minus_learning_rate: Any,
    ) -> Any:
        """Both variants, without branches: a share of 0 or 1 changes no bit."""
        momentum_buffer = decay * momentum_buffer + weight * g
        return minus_learning_rate * (share * g + buffer_share * momentum_buffer), momentum_buffer
