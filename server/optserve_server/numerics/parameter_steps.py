"""How many steps each parameter has taken part in, since a step may leave parameters out. Only some methods use it.

The form on disk is one number if all parameters have the same, else a list in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optserve_server.numerics.layout import Selection

MAX_STEP = 1 << 62
"""The largest number that a client may send. It is far below the end of the counter."""

MAX_COUNT = (1 << 63) - 1
"""The largest number of a counter, and so the largest number on disk."""

Written = int | Sequence[int]
"""The form on disk."""


class ParameterSteps:
    """Counts the steps of each parameter.

    As long as all parameters have taken part in the same number of steps, that is a single number.

    Args:
        counters: Those of the parameters, in their order; empty if the rule does not use them.

    Attributes:
        shared: The counter that all parameters have; None if they differ.
    """

    def __init__(self, counters: Sequence[int] | np.ndarray) -> None:
        self._set(np.array(counters, np.int64))

    def _set(self, counters: np.ndarray) -> None:
        # Out of date while there is a shared one.
        self._counters = counters
        self.shared: int | None = None
        if counters.size and (counters == counters[0]).all():
            self.shared = int(counters[0])

    @property
    def each(self) -> np.ndarray:
        """The counter of each parameter. Do not change it."""
        return self._counters if self.shared is None else np.full_like(self._counters, self.shared)

    def of(self, tensor: int) -> int:
        """The counter of a parameter; 0 if the rule does not use counters."""
        if self.shared is not None:
            return self.shared
        return int(self._counters[tensor]) if self._counters.size else 0

    def count(self, selection: Selection) -> None:
        """Count one more step for the parameters that have taken part in it."""
        if self.shared is not None and selection.is_all:
            self.shared += 1
        elif self._counters.size:
            counters = self.each.copy()
            counters[slice(None) if selection.is_all else list(selection.listed)] += 1
            self._set(counters)

    def replace(self, given: Written) -> None:
        """Replace the counters, if the rule uses them, by those in the form on disk.

        Raises:
            ValueError: See `each`.
        """
        if self._counters.size:
            self._set(np.array(each(given, self._counters.size), np.int64))

    @property
    def written(self) -> Written | None:
        """The form on disk; None if the rule does not use counters."""
        if not self._counters.size:
            return None
        return self._counters.tolist() if self.shared is None else self.shared


def each(given: Written, parameters: int, most: int = MAX_COUNT) -> list[int]:
    """The number of each parameter.

    Args:
        given: The form on disk.
        parameters: Number of parameters.
        most: Largest number that is allowed.

    Raises:
        ValueError: The number of counters is wrong, or a counter is impossible.
    """
    numbers = [given] * parameters if isinstance(given, int) else list(given)
    if len(numbers) != parameters:
        raise ValueError(f"there are step counters of {len(numbers)} parameters, not of {parameters}")
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number <= most:
            raise ValueError(f"the step counter of a parameter must be 0 to {most}, not {number!r}")
    return numbers
