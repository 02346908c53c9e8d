"""Lion: Chen et al., arXiv:2302.06675, Algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars


class Lion(contract.Lion):
    """Δx = −η sign(β1 m + (1−β1) g), and after it m ← β2 m + (1−β2) g.

    The sign of 0 is 0. Every element moves by η, so there is no factor on −g.
    """

    slots = ("grad_avg",)
    signed_slots = ("grad_avg",)
    squares_gradient = False
    needs_tiny = True

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """β1, 1−β1, β2, 1−β2, −η."""
        return self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, -self.learning_rate

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule."""
        gradient, slots = given.gradient, given.slots
        mean = max(-slots[0][0], slots[0][1], gradient)
        return -scalars[4], ((-mean, mean),)

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,  # noqa: ARG004
        g: Any,
        grad_avg: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        minus_learning_rate: Any,
        tiny: Any,
    ) -> Any:
        """The sign is c / (|c| + tiny), twice. The first makes at least the rounding error of 1 of what is not 0.

        That is so much more than tiny that the second makes exactly 1 or −1 of it. 0 stays 0.
        """
        blend = beta1 * grad_avg + one_minus_beta1 * g
        near = blend / (abs(blend) + tiny)
        sign = near / (abs(near) + tiny)
        return minus_learning_rate * sign, beta2 * grad_avg + one_minus_beta2 * g
