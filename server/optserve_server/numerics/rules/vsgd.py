"""vSGD: Schaul, Zhang and LeCun, "No More Pesky Learning Rates", arXiv:1206.1106; the paper's equation 7."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.base import Given, Interval, Scalars

_TINY = 1e-30
"""Keeps 0 / 0 out where every gradient so far was 0; far below any square of a gradient that matters."""


class Vsgd(contract.Vsgd):
    """Δx = −(1 / E[|h|]) (E[g]² / E[g²]) g, h = diag(H), over a window of τ steps that adapts per dimension.

    Each average y takes y ← (1 − 1/τ) E[y] + y / τ, and then τ ← (1 − E[g]² / E[g²]) τ + 1. The signal E[g]² / E[g²] is
    kept at 1 at most, which rounding would exceed where gradients are constant, and τ at 1 at least. E[|h|] has ε added
    to it.

    The first `initial_steps` steps move nothing: they make the first estimates, plain means, of which E[g²] and E[|h|]
    are enlarged by `initial_overestimate`, the authors' slow start. This is the C of their section 4, for which they
    advise a tenth of the number of parameters. Their own program (PyOptim) takes 2 after 10 samples, adds 1e-9 to the
    mean of g², and enlarges E[|h|] in its earlier versions only.

    While it makes its first estimates, the slot τ holds minus the number of steps so far.
    """

    slots = ("grad_avg", "square_avg", "curvature_avg", "tau")
    signed_slots = ("grad_avg", "tau")
    squares_gradient = True
    gradient_square_slot = "square_avg"
    eps_in_root = False

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: ARG002
        """ε, the overestimate less 1, the initial steps, 1, 1/2 and a tiny number."""
        return self.eps, self.initial_overestimate - 1.0, self.initial_steps, 1.0, 0.5, _TINY

    def gradient_limit(self, dtype: np.dtype) -> float:
        """As for every rule; the enlarged square has to be finite as well."""
        return super().gradient_limit(dtype) / math.sqrt(self.initial_overestimate)

    @classmethod
    def bounds(cls, given: Given, scalars: Scalars) -> tuple[float, Sequence[Interval]]:
        """See Rule. The averages are means of what came, enlarged once; the signal is at most 1."""
        numbers, gradient, curvature, slots, steps = given
        eps, overestimate, initial_steps = scalars[0], scalars[1] + 1.0, scalars[2]
        grad_avg, square_avg, curvature_avg, tau = slots
        enlarged = overestimate if tau[0] <= 0 else 1.0
        mean = max(-grad_avg[0], grad_avg[1], gradient)
        square = enlarged * max(square_avg[1], gradient * gradient)
        slots = (
            (-mean, mean),
            (0.0, square),
            (0.0, enlarged * max(curvature_avg[1], curvature)),
            (tau[0] - steps if tau[0] <= 0 else 1.0, max(tau[1], initial_steps) + steps),
        )
        # Beyond, float32 has not all whole numbers.
        whole = max(-slots[3][0], slots[3][1]) < 1 << 23 and max(square, mean * mean, 1.0 / eps) <= numbers.most
        return gradient / eps if whole else math.inf, slots

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """E[g]² / (E[g²] E[|h|]); 0 while the first estimates are made."""
        power = slots["grad_avg"] ** 2
        signal = power / (np.maximum(slots["square_avg"], power) + _TINY)
        # The step that ends the first estimates, and leaves their number behind as τ, has moved nothing either.
        started = (slots["tau"] > 0) & (slots["tau"] != self.initial_steps)
        return started * signal / (slots["curvature_avg"] + self.eps)

    def unreachable_values(self, slot: str, values: np.ndarray) -> np.ndarray | None:
        """τ is at least 1, or minus a number of steps that is less than `initial_steps` can be.

        Steps add at most 1 to it, so it comes to no number from which the next whole one is not told any more.
        """
        if slot != "tau":
            return None
        most = 2.0 / np.finfo(values.dtype).eps
        most_initial_steps = self.range_of("initial_steps").high
        steps = (values <= 0) & (values > -most_initial_steps) & (values == np.rint(values))
        return ~(steps | ((values >= 1) & (values <= most)))

    @staticmethod
    def update(  # noqa: PLR0913 - the formula's operands, slots and constants
        sqrt: Any,  # noqa: ARG004
        g: Any,
        h: Any,
        grad_avg: Any,
        square_avg: Any,
        curvature_avg: Any,
        tau: Any,
        eps: Any,
        overestimate_less_one: Any,
        initial_steps: Any,
        one: Any,
        half: Any,
        tiny: Any,
    ) -> Any:
        """Equation 7, without branches: `starting` and `last` are 1 or 0, by (|y| − |y − 1| + 1) / 2."""
        starting = half * (abs(one - tau) - abs(tau) + one)
        seen = abs(tau)
        past = seen + one + one - initial_steps
        last = starting * (half * (abs(past) - abs(past - one) + one))
        weight = one / (seen + starting)
        kept = one - weight
        enlarged = one + overestimate_less_one * last
        # Not average + weight * (new - average), which cancels where the weight is 1 and the average is much larger.
        grad_avg = kept * grad_avg + weight * g
        square_avg = enlarged * (kept * square_avg + weight * (g * g))
        curvature_avg = enlarged * (kept * curvature_avg + weight * abs(h))
        # max(E[g²], E[g]²), halves first, so that the sum of two large numbers is finite.
        power = half * (grad_avg * grad_avg)
        square = half * square_avg
        signal = (power + power) / (square + power + abs(square - power) + tiny)
        started = one - starting
        # Rounding can leave the signal a little above 1.
        tau = starting * (last * (initial_steps + seen + one) - (seen + one)) + started * (
            abs(one - signal) * tau + one
        )
        return -(started * (signal / (curvature_avg + eps))) * g, grad_avg, square_avg, curvature_avg, tau
