"""Error feedback: what rounding to the wire's dtype has left out of a gradient is added to the next one.

The sum of what was sent then stays within one rounding of the sum of the gradients, however many steps there are
(Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., arXiv:1901.09847).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optserve import halves


class ErrorFeedback:
    """The rounding errors of one optimizer's gradients; as large as the parameters.

    Args:
        wire: The dtype to which gradients are rounded.
    """

    def __init__(self, wire: np.dtype) -> None:
        self._wire = wire
        self._errors: dict[int, np.ndarray] = {}

    def compensated(self, indices: Sequence[int], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """New arrays: the gradients with the errors of the steps before."""
        # Also where there is none yet: the caller's own array may take the updates.
        return [
            array + self._errors[index] if index in self._errors else array.copy()
            for index, array in zip(indices, arrays, strict=True)
        ]

    def keep(self, indices: Sequence[int], arrays: Sequence[np.ndarray]) -> None:
        """The step of these compensated gradients has been applied: remember what they lost on the way."""
        for index, array in zip(indices, arrays, strict=True):
            if index not in self._errors:
                self._errors[index] = np.empty_like(array)
            errors = self._errors[index]
            for start in range(0, array.size, halves.BLOCK):
                block = slice(start, start + halves.BLOCK)
                self._note_errors(array.reshape(-1)[block], errors.reshape(-1)[block])

    def _note_errors(self, elements: np.ndarray, errors: np.ndarray) -> None:
        sent = np.empty(elements.size, self._wire)
        halves.convert(elements, sent)
        halves.convert(sent, errors)
        np.subtract(elements, errors, out=errors)
