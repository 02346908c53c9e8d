"""Error feedback: what rounding to the wire's dtype has left out of a gradient is added to the next one.

The sum of what was applied then stays within one rounding of the sum of its gradients, however many steps there are
(Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., arXiv:1901.09847).

What is owed changes with a step that was applied, once, and with nothing else: not with one that was refused, and with
one that was interrupted only when it is known that it was applied. A state that is replaced owes nothing, because the
gradients of which something was left out are not in it any more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from optserve._common import half_floats

logger = logging.getLogger(__name__)

MAX_UNDECIDED = 4
"""Interrupted steps whose errors are kept, each as large as the parameters, until it is known which was applied."""


class Rounding:
    """What rounding leaves out of the gradients of one step, which may take several tries to send.

    Args:
        owed: What the steps before have left out, flat, by index of the parameter. It is only read.

    Attributes:
        errors: What is owed once this step is applied, for its parameters; None until a try has converted all of them.
    """

    def __init__(self, owed: Mapping[int, np.ndarray]) -> None:
        self._owed = owed
        self.errors: dict[int, np.ndarray] | None = None

    def attempt(self) -> Attempt:
        """For one try: what an earlier one, whose thread may still run, leaves behind has no influence on it."""
        return Attempt(self, self._owed)


class Attempt:
    """Rounds the gradients of one step, piece by piece."""

    def __init__(self, rounding: Rounding, owed: Mapping[int, np.ndarray]) -> None:
        self._rounding = rounding
        self._owed = owed
        self._errors: dict[int, np.ndarray] = {}

    def convert(self, index: int, gradient: np.ndarray, start: int, target: np.ndarray) -> None:
        """Round a piece of a gradient, after adding what is owed to it.

        Args:
            index: The parameter.
            gradient: All of it, flat.
            start: Where the piece begins.
            target: Takes the piece, in the wire's dtype.
        """
        owed = self._owed.get(index)
        if index not in self._errors:
            self._errors[index] = np.empty_like(gradient)
        errors = self._errors[index]
        for begin in range(start, start + target.size, half_floats.BLOCK):
            block = slice(begin, min(begin + half_floats.BLOCK, start + target.size))
            elements = gradient[block] if owed is None else gradient[block] + owed[block]
            sent = target[block.start - start : block.stop - start]
            half_floats.convert(elements, sent)
            half_floats.convert(sent, errors[block])
            # What the wire cannot hold is infinite there; the server refuses it, and these errors go with the step.
            with np.errstate(invalid="ignore"):
                np.subtract(elements, errors[block], out=errors[block])

    def finish(self) -> None:
        """All gradients of the step have been converted."""
        if self._rounding.errors is None:
            self._rounding.errors = self._errors


class ErrorFeedback:
    """The rounding errors of one optimizer's gradients; as large as the parameters.

    To be used by one thread at a time.
    """

    def __init__(self) -> None:
        # Never written to once they are here: threads that send what nobody waits for any more may still read them.
        self._owed: dict[int, np.ndarray] = {}
        self._undecided: dict[str, Rounding] = {}

    @property
    def undecided(self) -> bool:
        """Whether there are steps of which it is not known whether they were applied."""
        return bool(self._undecided)

    def begin(self, request_id: str) -> Rounding:
        """A step is about to be sent; its errors are kept until it is known what became of it."""
        if len(self._undecided) >= MAX_UNDECIDED:
            oldest = next(iter(self._undecided))
            del self._undecided[oldest]
            logger.warning(
                "%d steps in a row were interrupted. Should the first of them still be applied, the rounding errors of "
                "its gradients are not fed back.",
                MAX_UNDECIDED,
            )
        rounding = self._undecided[request_id] = Rounding(self._owed)
        return rounding

    def applied(self, request_id: str) -> None:
        """That step was applied, so no other of those that are undecided was; said again, it changes nothing."""
        rounding = self._undecided.pop(request_id, None)
        if rounding is not None:
            # All of it was converted, or it could not have been applied.
            self._owed = {**self._owed, **(rounding.errors or {})}
        self._undecided.clear()

    def refused(self, request_id: str) -> None:
        """That step was certainly not applied."""
        self._undecided.pop(request_id, None)

    def reset(self) -> None:
        """The state is another one, or nothing is known of it any more."""
        self._owed = {}
        self._undecided.clear()
