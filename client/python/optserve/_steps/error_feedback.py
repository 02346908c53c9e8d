"""Error feedback: the error of rounding a gradient to the wire's dtype, its residual, is added to the next gradient.

The sum of the applied gradients then stays within one rounding of the sum of the exact ones, after any number of steps
(Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., arXiv:1901.09847).

A residual changes once per applied step. A refused step does not change it, and an interrupted step does only once it
is known that the server has applied it. When the state is replaced, all residuals become 0: the gradients that they
belong to are not in the new state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from optserve._common import half_floats

logger = logging.getLogger(__name__)

MAX_UNDECIDED = 4
"""Interrupted steps whose residuals are kept, until it is known which was applied; each is as large as the
parameters."""


class Rounding:
    """The rounding errors of one step, which may take several tries to send.

    Args:
        residuals: Rounding errors of the steps before, flat, by index of the parameter. They are only read.

    Attributes:
        errors: The residuals once this step is applied; None until a try has converted all of its gradients.
    """

    def __init__(self, residuals: Mapping[int, np.ndarray]) -> None:
        self._residuals = residuals
        self.errors: dict[int, np.ndarray] | None = None

    def attempt(self) -> Attempt:
        """Begin one try. Each try has arrays of its own, because the thread of an earlier one may still write."""
        return Attempt(self, self._residuals)


class Attempt:
    """Rounds the gradients of one step, piece by piece."""

    def __init__(self, rounding: Rounding, residuals: Mapping[int, np.ndarray]) -> None:
        self._rounding = rounding
        self._residuals = residuals
        self._errors: dict[int, np.ndarray] = {}

    def convert(self, index: int, gradient: np.ndarray, start: int, target: np.ndarray) -> None:
        """Add the residual to a piece of a gradient, and round the sum.

        Args:
            index: The parameter.
            gradient: All of it, flat.
            start: Where the piece begins.
            target: Takes the piece, in the wire's dtype.
        """
        residual = self._residuals.get(index)
        if index not in self._errors:
            self._errors[index] = np.empty_like(gradient)
        errors = self._errors[index]
        for begin in range(start, start + target.size, half_floats.BLOCK):
            block = slice(begin, min(begin + half_floats.BLOCK, start + target.size))
            elements = gradient[block] if residual is None else gradient[block] + residual[block]
            sent = target[block.start - start : block.stop - start]
            half_floats.convert(elements, sent)
            half_floats.convert(sent, errors[block])
            # A value that the wire cannot hold becomes infinite. The server then refuses the step, and these errors are
            # dropped with it.
            with np.errstate(invalid="ignore"):
                np.subtract(elements, errors[block], out=errors[block])

    def finish(self) -> None:
        """All gradients of the step have been converted."""
        if self._rounding.errors is None:
            self._rounding.errors = self._errors


class ErrorFeedback:
    """The residuals of one optimizer's gradients; as large as the parameters. For one thread at a time."""

    def __init__(self) -> None:
        # These arrays are never written: the thread of an interrupted step may still read them.
        self._residuals: dict[int, np.ndarray] = {}
        self._undecided: dict[str, Rounding] = {}

    @property
    def undecided(self) -> bool:
        """Whether there are steps that may or may not have been applied."""
        return bool(self._undecided)

    def begin(self, request_id: str) -> Rounding:
        """Begin to send a step; its errors are kept until it is known whether it was applied."""
        if len(self._undecided) >= MAX_UNDECIDED:
            oldest = next(iter(self._undecided))
            del self._undecided[oldest]
            logger.warning(
                "%d steps in a row were interrupted. If the server still applies the first of them, the rounding "
                "errors of its gradients are lost.",
                MAX_UNDECIDED,
            )
        rounding = self._undecided[request_id] = Rounding(self._residuals)
        return rounding

    def applied(self, request_id: str) -> None:
        """The step was applied, so no other undecided step was. A second call changes nothing."""
        rounding = self._undecided.pop(request_id, None)
        if rounding is not None:
            # The errors are complete: the server applies complete steps only.
            self._residuals = {**self._residuals, **(rounding.errors or {})}
        self._undecided.clear()

    def refused(self, request_id: str) -> None:
        """The step was certainly not applied."""
        self._undecided.pop(request_id, None)

    def reset(self) -> None:
        """Set all residuals to 0: the state was replaced, or is not known any more."""
        self._residuals = {}
        self._undecided.clear()
