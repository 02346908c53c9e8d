"""What Adam and its relatives have in common: decaying averages of gradients and squares, and their quotient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from optserve_server.numerics.rules.base import Given, Interval, Numbers, Rule, Scalars, squares_overflow


class Weights(NamedTuple):
    """With what a step averages, rounded to a dtype.

    Attributes:
        beta1: Decay of m, the average of gradients.
        one_minus_beta1: Weight of a gradient in it.
        kept: The least part of v, the average of squares, that is left in a step.
        share: The least part of the square of a gradient that is in v after its step.
    """

    beta1: float
    one_minus_beta1: float
    kept: float
    share: float


def largest_quotient(
    numbers: Numbers, gradient: float, slots: Sequence[Interval], weights: Weights, eps: float, steps: int
) -> float:
    """The largest |m| / (√v + ε) after at most `steps` steps.

    A gradient of k steps ago is at most √v / √(share kept^k), if its square has not vanished; so the part of m that
    these steps bring is bounded by √v. The part that is left of the m before is not, and v may have been 0.

    Args:
        numbers: Of the dtype.
        gradient: The largest magnitude of g.
        slots: In which m and v lie before the steps.
        weights: Of the averages.
        eps: ε.
        steps: So many, or fewer.
    """
    before = max(-slots[0][0], slots[0][1])
    any_quotient = max(before, gradient) / eps
    least_share = weights.share * weights.kept ** (steps - 1)
    if least_share <= 0:
        return any_quotient
    total, term = 0.0, 1.0
    for _ in range(steps):
        total += term
        term *= weights.beta1 / math.sqrt(weights.kept) if weights.kept > 0 else 0.0
    brought = weights.one_minus_beta1 * total / math.sqrt(weights.share)
    vanished = math.sqrt(numbers.tiny / least_share)
    root = math.sqrt(numbers.remaining(slots[1][0], weights.kept, steps))
    return min(any_quotient, before / (root + eps) + brought + vanished / eps)


def _update(  # noqa: PLR0913 - the formula's operands, slots and constants
    sqrt: Any,
    g: Any,
    grad_avg: Any,
    square_avg: Any,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    correction: Any,
    root_correction: Any,
    eps: Any,
    minus_learning_rate: Any,
) -> Any:
    """The root before its correction, because v divided by 1−β2^t may be infinite."""
    grad_avg = beta1 * grad_avg + one_minus_beta1 * g
    square_avg = beta2 * square_avg + one_minus_beta2 * (g * g)
    quotient = grad_avg * correction / (sqrt(square_avg) * root_correction + eps)
    return minus_learning_rate * quotient, grad_avg, square_avg


class Moments(Rule):
    """m ← β1 m + (1−β1) g;  v ← β2 v + (1−β2) g²;  Δx = −η m̂ / (√v̂ + ε), with m̂ = m / (1−β1^t), v̂ = v / (1−β2^t)."""

    slots = ("grad_avg", "square_avg")
    signed_slots = ("grad_avg",)
    counts_steps = True
    squares_gradient = True
    gradient_square_slot: ClassVar[str | None] = "square_avg"
    eps_in_root = False

    learning_rate: float
    beta1: float
    beta2: float
    eps: float

    def corrections(self, step: int) -> tuple[float, float]:
        """The factors that make m̂ of m, and √v̂ of √v, at a parameter's step."""
        return 1.0 / (1.0 - self.beta1**step), 1.0 / math.sqrt(1.0 - self.beta2**step)

    def scalars(self, step: int) -> tuple[float, ...]:
        """β1, 1−β1, β2, 1−β2, the two corrections, ε, −η."""
        return (
            *(self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2),
            *self.corrections(step),
            *(self.eps, -self.learning_rate),
        )

    @classmethod
    def weights(cls, scalars: Scalars) -> Weights:
        """With what a step averages."""
        beta1, one_minus_beta1, beta2, one_minus_beta2 = scalars[:4]
        return Weights(beta1, one_minus_beta1, beta2, one_minus_beta2)

    @classmethod
    def largest_square(cls, gradient: float, square_avg: Interval, scalars: Scalars) -> float:  # noqa: ARG003
        """The most that v becomes."""
        return max(square_avg[1], gradient * gradient)

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. The correction of m is largest in the first step, that of √v is at least 1."""
        numbers, gradient, slots, steps = given.numbers, given.gradient, given.slots, given.steps
        correction, eps, rate = scalars[4], scalars[6], -scalars[7]
        weights = cls.weights(scalars)
        mean = max(-slots[0][0], slots[0][1], gradient)
        square_avg = cls.largest_square(gradient, slots[1], scalars)
        quotient = correction * largest_quotient(numbers, gradient, slots, weights, eps, steps)
        whole = max(correction * mean, quotient, square_avg) <= numbers.most
        after = (-mean, mean), (numbers.remaining(slots[1][0], weights.kept, steps), square_avg)
        return rate * quotient if whole else math.inf, after

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """η / (√v̂ + ε), the factor on −m̂."""
        return self.learning_rate / (np.sqrt(slots["square_avg"]) * self.corrections(step)[1] + self.eps)

    def unreachable_values(self, slot: str, values: np.ndarray) -> np.ndarray | None:
        """M is a mean of gradients whose squares are finite. Were its own not, every step could be refused."""
        return squares_overflow(values) if slot == "grad_avg" else None

    # As a variable, because a relative's own has other operands.
    update = staticmethod(_update)


class CorrectableMoments(Moments):
    """Moments that are corrected only if one asks for it: without, m̂ is m and v̂ is v."""

    bias_correction: bool

    def corrections(self, step: int) -> tuple[float, float]:
        """See Moments."""
        return super().corrections(step) if self.bias_correction else (1.0, 1.0)
