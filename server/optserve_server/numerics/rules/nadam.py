"""NAdam: Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016, as torch has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars
from optserve_server.numerics.rules.moments import Moments, largest_quotient

_BASE = 0.96
"""The paper's constant in μ_t."""

_NOTHING = 2.0**-54
"""What 1 loses when less than this is taken off: nothing."""


@lru_cache(maxsize=64)
def _factors(momentum_decay: float) -> Sequence[float]:
    """The products of 1 − 0.96^(i ψ) / 2 over i = 1 to t, at index t, up to the last that matters.

    A product goes on changing for at most about 2,400 factors: then either it is nothing, or its factors are 1.
    """
    products, i = [1.0], 1
    while products[-1] > _NOTHING:
        less = 0.5 * _BASE ** (i * momentum_decay)
        if less < _NOTHING:
            break
        products.append(products[-1] * (1.0 - less))
        i += 1
    return products


class Nadam(Moments, contract.Nadam):
    """Δx = −η ((1−μ_t) g / (1−Π μ_i) + μ_{t+1} m / (1−Π μ_i μ_{t+1})) / (√v̂ + ε), with μ_t = β1 (1 − 0.96^(t ψ) / 2).

    The products over i = 1 to t are a function of t alone, so the state has no product that rounding, or another ψ,
    could take from its place, as torch's mu_product.
    """

    momentum_decay: float

    def momentum_at(self, step: int) -> float:
        """μ_t."""
        return self.beta1 * (1.0 - 0.5 * _BASE ** (step * self.momentum_decay))

    def momentum_product(self, step: int) -> float:
        """The product of μ_1 to μ_t: β1^t times that of the other factors."""
        factors = _factors(self.momentum_decay)
        return self.beta1**step * factors[min(step, len(factors) - 1)]

    def scalars(self, step: int) -> tuple[float, ...]:
        """β1, 1−β1, β2, 1−β2, the shares of g and of m in the update, the correction of √v, ε, −η."""
        share = (1.0 - self.momentum_at(step)) / (1.0 - self.momentum_product(step))
        average_share = self.momentum_at(step + 1) / (1.0 - self.momentum_product(step + 1))
        return (
            *(self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2),
            *(share, average_share, self.corrections(step)[1]),
            *(self.eps, -self.learning_rate),
        )

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. The share of g is at most 1, that of m at most twice what it is in the first step.

        For μ_t lies between β1 / 2 and β1, and the product falls.
        """
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        share, average_share, eps, rate = scalars[4], 2.0 * scalars[5], scalars[7], -scalars[8]
        weights = cls.weights(scalars)
        mean = max(-slots[0][0], slots[0][1], gradient)
        square_avg = cls.largest_square(gradient, slots[1], scalars)
        of_gradient = min(gradient / eps, numbers.steepest(eps) / math.sqrt(weights.share))
        of_average = largest_quotient(numbers, gradient, slots, weights, eps, steps)
        quotient = share * of_gradient + average_share * of_average
        whole = max(share * gradient + average_share * mean, quotient, square_avg) <= numbers.most
        after = (-mean, mean), (numbers.remaining(slots[1][0], weights.kept, steps), square_avg)
        return rate * quotient if whole else math.inf, after

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,
        g: Any,
        grad_avg: Any,
        square_avg: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        share: Any,
        average_share: Any,
        root_correction: Any,
        eps: Any,
        minus_learning_rate: Any,
    ) -> Any:
        """Both parts over one root."""
        grad_avg = beta1 * grad_avg + one_minus_beta1 * g
        square_avg = beta2 * square_avg + one_minus_beta2 * (g * g)
        quotient = (share * g + average_share * grad_avg) / (sqrt(square_avg) * root_correction + eps)
        return minus_learning_rate * quotient, grad_avg, square_avg
