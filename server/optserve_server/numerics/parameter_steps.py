"""How many steps each parameter has taken part in, since a step may leave parameters out. Only some methods use it.

The form on disk is one number if all parameters have the same, else a list in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_STEP = 1 << 62
"""The largest number that a client may send. It is far below the end of the counter."""

MAX_COUNT = (1 << 63) - 1
"""The largest number of a counter, and so the largest number on disk."""

Written = int | Sequence[int]
"""The form on disk."""


def written(steps: np.ndarray) -> Written:
    """The form on disk of step counters."""
    if steps.size and (steps == steps[0]).all():
        return int(steps[0])
    return steps.tolist()


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
