"""How many steps each parameter has taken part in: kept where the method uses it, since a step may skip parameters.

It is written down as one number where all parameters have the same, else as a list in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_STEP = 1 << 62
"""The most that a client may send, which leaves a counter room to count on."""

MAX_COUNT = (1 << 63) - 1
"""The most that a counter can come to, and so the most that is written down."""

Written = int | Sequence[int]
"""The form in which it is written down."""


def written(steps: np.ndarray) -> Written:
    """The form in which it is written down."""
    if steps.size and (steps == steps[0]).all():
        return int(steps[0])
    return steps.tolist()


def each(given: Written, parameters: int, most: int = MAX_COUNT) -> list[int]:
    """The number of each parameter.

    Args:
        given: As it is written down.
        parameters: How many there are.
        most: Largest number.

    Raises:
        ValueError: They are not as many, or none that can be.
    """
    numbers = [given] * parameters if isinstance(given, int) else list(given)
    if len(numbers) != parameters:
        raise ValueError(f"there are steps of {len(numbers)} parameters, not of {parameters}")
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number <= most:
            raise ValueError(f"the steps of a parameter are 0 to {most}, not {number!r}")
    return numbers
