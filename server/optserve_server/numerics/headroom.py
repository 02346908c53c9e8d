"""For how many steps nothing can become infinite, worked out from bounds, so that most steps need no look at the data.

A rule bounds its own results (`Rule.bounds`). From the extremes of the slots, once measured, some steps ahead are
bounded with gradients larger than those that have come; while theirs are no larger, a step costs a comparison. Nothing
here is exact: what is not covered may still be good, and is tried out, see `trial.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optserve._common import half_floats
from optserve_server.numerics.layout import Largest, Operand
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.rules.base import NUMBERS, Interval, Scalars

LOOK_AHEAD = (64, 32, 8)
"""How many steps are looked ahead at a time, the most first. For fewer, the state is looked at."""
ENDLESS = 1 << 62
"""Steps where none changes any bound."""
SLACK = 1 + 2e-6
"""Bounds are computed in float64, and widened for each step by more than float32 loses in the operations of a rule."""
GENEROUS = (8.0, 2.0, SLACK)
"""So many times larger the gradients of the steps ahead may be, the most first."""


class Answers(NamedTuple):
    """The wire dtypes in which a step's reply is read that are narrower than the state's.

    Attributes:
        updates: Where the reply has the updates.
        parameters: Where it has x.
    """

    updates: tuple[np.dtype, ...] = ()
    parameters: tuple[np.dtype, ...] = ()


NATIVE = Answers()
"""What is computed, as it is."""


class Bounds(NamedTuple):
    """Of one dtype's state.

    Attributes:
        slots: In which the elements of each lie.
        parameters: The largest magnitude of x; 0 where it is not hosted.
    """

    slots: tuple[Interval, ...]
    parameters: float


class _Limits(NamedTuple):
    update: float
    parameters: float


class Headroom:
    """Follows the bounds of one optimizer.

    Args:
        measure: Looks at the state.
        hosted: Whether it has x.
    """

    def __init__(self, measure: Callable[[], dict[np.dtype, Bounds]], *, hosted: bool) -> None:
        self._measure = measure
        self._hosted = hosted
        self._rule: type[Rule] = Rule
        self._scalars: Mapping[np.dtype, Sequence[Scalars]] = {}
        # The bounds before some steps with operands of at most `_admitted`, and how many of these have been made.
        self._begin: dict[np.dtype, Bounds] | None = None
        self._taken = self._covered = 0
        self._admitted: Largest = {}
        self._limits: dict[np.dtype, _Limits] = {}

    def set(self, rule: type[Rule], scalars: Mapping[np.dtype, Sequence[Scalars]]) -> None:
        """Take other constants.

        Args:
            rule: The method.
            scalars: The constants of each rule without a schedule, by whose factor a learning rate only becomes
                smaller, rounded to the dtype.
        """
        self._rule, self._scalars = rule, {dtype: list(dict.fromkeys(rows)) for dtype, rows in scalars.items()}
        self.forget()

    def forget(self) -> None:
        """The state has changed by something else than a step that was covered."""
        self._begin = None
        self._taken = self._covered = 0

    def covers(self, largest: Largest, answers: Answers) -> bool:
        """Whether a step leaves everything finite, and its reply too; it then counts as made.

        Args:
            largest: Of its operands, once clipped.
            answers: How its reply is read.
        """
        if self._taken >= self._covered or (answers is not NATIVE and not self._answers(answers)):
            return self._look_ahead(largest, answers)
        admitted = self._admitted
        for key, value in largest.items():
            if not value <= admitted.get(key, -1.0):
                return self._look_ahead(largest, answers)
        self._taken += 1
        return True

    def _answers(self, answers: Answers) -> bool:
        """Whether the steps ahead keep within the limits of a reply."""
        wanted = {dtype: _limits(dtype, answers) for dtype in self._limits}
        return all(
            self._limits[dtype].update <= limits.update and self._limits[dtype].parameters <= limits.parameters
            for dtype, limits in wanted.items()
        )

    def _look_ahead(self, largest: Largest, answers: Answers) -> bool:
        """Look ahead anew: from what is known, or else from a look at the state."""
        limits = {dtype: _limits(dtype, answers) for dtype in self._scalars}
        known = self._after(self._begin, self._admitted, self._limits, self._taken) if self._begin else None
        generous = self._generous(largest)
        if known and any(self._goes_on(known, generous, limits, steps) for steps in LOOK_AHEAD):
            return True
        measured = self._measure()
        # Rather smaller gradients than fewer steps: one that was very large may have been the only one.
        admitted = [generous, *({key: factor * value for key, value in largest.items()} for factor in GENEROUS)]
        if any(self._goes_on(measured, most, limits, steps) for steps in (*LOOK_AHEAD, 1) for most in admitted):
            return True
        self.forget()
        return False

    def _generous(self, largest: Largest) -> Largest:
        """As much as ever came, also of dtypes that take no part now, and more than what comes now."""
        more = {key: max(GENEROUS[0] * value, self._admitted.get(key, 0.0)) for key, value in largest.items()}
        return self._admitted | more

    def _goes_on(
        self, begin: dict[np.dtype, Bounds], admitted: Largest, limits: dict[np.dtype, _Limits], steps: int
    ) -> bool:
        """Whether so many steps from these bounds on are covered; the first counts as made then."""
        if self._after(begin, admitted, limits, steps) is None:
            return False
        self._begin, self._admitted, self._limits = begin, admitted, limits
        self._taken, self._covered = 1, steps if self._rule.slots or self._hosted else ENDLESS
        return True

    def _after(
        self, before: dict[np.dtype, Bounds], admitted: Largest, limits: dict[np.dtype, _Limits], steps: int
    ) -> dict[np.dtype, Bounds] | None:
        """The bounds after some steps, each of all or some parameters; None if something may be beyond its limit."""
        after: dict[np.dtype, Bounds] = {}
        slack = SLACK ** min(steps, LOOK_AHEAD[0])
        for dtype, bounds in before.items():
            gradient = admitted.get((Operand.GRADIENT, dtype))
            if gradient is None:
                after[dtype] = bounds
                continue
            curvature = admitted.get((Operand.CURVATURE, dtype), 0.0)
            numbers, slots, update = NUMBERS[dtype], bounds.slots, 0.0
            for scalars in self._scalars[dtype]:
                found = self._rule.bounds(numbers, gradient, curvature, bounds.slots, scalars, steps)
                # In this form it holds for NaN as well.
                if found is None or not found[0] * slack <= limits[dtype].update:
                    return None
                update = max(update, found[0] * slack)
                slots = tuple(_widened(*pair, slack, numbers.tiny) for pair in zip(slots, found[1], strict=True))
            parameters = (bounds.parameters + steps * update) * slack if self._hosted else 0.0
            if not (parameters <= limits[dtype].parameters and all(_reach(slot) <= numbers.most for slot in slots)):
                return None
            after[dtype] = Bounds(slots, parameters)
        return after


def _widened(known: Interval, found: Interval, slack: float, tiny: float) -> Interval:
    """Both intervals, the one that was found with all that rounding may add to it."""
    low, high = found
    # What is never negative is never rounded to something negative.
    low = low if low >= 0 else low * slack - tiny
    return min(known[0], low), max(known[1], high * slack + tiny)


def _reach(interval: Interval) -> float:
    """The largest magnitude in an interval; NaN if there is one."""
    low, high = interval
    return high if high >= -low else -low


def _limits(dtype: np.dtype, answers: Answers) -> _Limits:
    """The largest magnitudes of updates and x that a dtype and the wires hold."""
    most = NUMBERS[dtype].most
    return _Limits(
        min((half_floats.largest(wire) for wire in answers.updates), default=most),
        min((half_floats.largest(wire) for wire in answers.parameters), default=most),
    )
