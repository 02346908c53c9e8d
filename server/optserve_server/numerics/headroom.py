"""Computes from bounds for how many steps nothing can become infinite, so that most steps need no pass over the state.

`Rule.bounds` gives bounds of the results of a rule. `Headroom` computes them for the next steps, from the measured
extremes of the slots, for gradients larger than the present ones. As long as gradients stay below, a step costs one
comparison. The bounds are not exact: a step that they do not cover may still be good. A trial checks it, see
`trial.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optserve._common import half_floats
from optserve_server.numerics.layout import Largest, Operand
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.rules.base import NUMBERS, Given, Interval, Scalars

LOOK_AHEAD = (64, 32, 8)
"""Numbers of steps to bound at once, in the order of the tries. If fewer are covered, the state is measured anew."""
ENDLESS = 1 << 62
"""Number of steps that are covered if no step changes a bound."""
SLACK = 1 + 2e-6
"""Bounds are computed in float64, and widened for each step by more than float32 loses in the operations of a rule."""
GRADIENT_FACTORS = (8.0, 2.0, SLACK)
"""How many times larger the gradients of the next steps may be, in the order of the tries."""


class ReplyWires(NamedTuple):
    """The wire dtypes of a step's reply that are narrower than the state's.

    Attributes:
        updates: If the reply has the updates.
        parameters: If the reply has x.
    """

    updates: tuple[np.dtype, ...] = ()
    parameters: tuple[np.dtype, ...] = ()


NATIVE = ReplyWires()
"""A reply in the state's own dtypes, or none."""


class Bounds(NamedTuple):
    """The bounds of the state of one dtype.

    Attributes:
        slots: The interval of each slot's elements.
        parameters: The largest magnitude of x; 0 in delta mode.
    """

    slots: tuple[Interval, ...]
    parameters: float


class _Limits(NamedTuple):
    update: float
    parameters: float


class Headroom:
    """Follows the bounds of one optimizer.

    Args:
        measure: Measures the bounds of the state, in one pass over it.
        hosted: Whether the state has x.
    """

    def __init__(self, measure: Callable[[], dict[np.dtype, Bounds]], *, hosted: bool) -> None:
        self._measure = measure
        self._hosted = hosted
        self._rule: type[Rule] = Rule
        self._scalars: Mapping[np.dtype, Sequence[Scalars]] = {}
        self._added_decay = 0.0
        # `_begin` are the bounds before the first of `_steps_covered` steps, with operands of at most `_admitted`;
        # `_steps_made` of them have been made.
        self._begin: dict[np.dtype, Bounds] | None = None
        self._steps_made = self._steps_covered = 0
        self._admitted: Largest = {}
        self._limits: dict[np.dtype, _Limits] = {}

    def set(self, rule: type[Rule], scalars: Mapping[np.dtype, Sequence[Scalars]], added_decay: float = 0.0) -> None:
        """Set the constants of the rule.

        Args:
            rule: The method.
            scalars: The constants of each group's rule, rounded to the dtype, without a schedule. (A schedule only
                makes a learning rate smaller.)
            added_decay: The largest λ of g + λ x, which the method gets instead of g.
        """
        self._added_decay = added_decay
        self._rule, self._scalars = rule, _distinct(scalars)
        self.reset()

    def change(self, scalars: Mapping[np.dtype, Sequence[Scalars]], added_decay: float = 0.0) -> None:
        """Go on with other constants from the next step on; see `set`.

        The steps that were made with the present constants have left the state within bounds that are known, and these
        hold whatever the next constants are.
        """
        self._begin, self._steps_made, self._steps_covered = self._known(), 0, 0
        self._scalars, self._added_decay = _distinct(scalars), added_decay

    def _known(self) -> dict[np.dtype, Bounds] | None:
        """The bounds at present; None if there are none."""
        if self._begin is None or not self._steps_made:
            return self._begin
        return self._after(self._begin, self._admitted, self._limits, self._steps_made)

    def reset(self) -> None:
        """Forget the bounds: the state was changed by something else than a covered step."""
        self._begin = None
        self._steps_made = self._steps_covered = 0

    def covers(self, largest: Largest, reply_wires: ReplyWires) -> bool:
        """Whether bounds show that a step leaves the state and its reply finite. If so, the step counts as made.

        Args:
            largest: The largest magnitudes of its operands, after clipping.
            reply_wires: The wire dtypes of its reply.
        """
        if self._steps_made >= self._steps_covered or (
            reply_wires is not NATIVE and not self._within_reply_limits(reply_wires)
        ):
            return self._look_ahead(largest, reply_wires)
        admitted = self._admitted
        for key, value in largest.items():
            if not value <= admitted.get(key, -1.0):
                return self._look_ahead(largest, reply_wires)
        self._steps_made += 1
        return True

    def _within_reply_limits(self, reply_wires: ReplyWires) -> bool:
        """Whether the covered steps stay within the limits of a reply."""
        wanted = {dtype: _limits(dtype, reply_wires) for dtype in self._limits}
        return all(
            self._limits[dtype].update <= limits.update and self._limits[dtype].parameters <= limits.parameters
            for dtype, limits in wanted.items()
        )

    def _look_ahead(self, largest: Largest, reply_wires: ReplyWires) -> bool:
        """Cover more steps: from the known bounds, or else from measured ones."""
        limits = {dtype: _limits(dtype, reply_wires) for dtype in self._scalars}
        known = self._known()
        generous = self._enlarged(largest)
        if known and any(self._covers_steps(known, generous, limits, steps) for steps in LOOK_AHEAD):
            return True
        measured = self._measure()
        # Smaller gradients are tried before fewer steps: a very large gradient may have been the only one.
        admitted = [generous, *({key: factor * value for key, value in largest.items()} for factor in GRADIENT_FACTORS)]
        if any(self._covers_steps(measured, most, limits, steps) for steps in (*LOOK_AHEAD, 1) for most in admitted):
            return True
        self.reset()
        return False

    def _enlarged(self, largest: Largest) -> Largest:
        """Magnitudes to admit: the largest so far, and more than the present ones."""
        more = {key: max(GRADIENT_FACTORS[0] * value, self._admitted.get(key, 0.0)) for key, value in largest.items()}
        return self._admitted | more

    def _covers_steps(
        self, begin: dict[np.dtype, Bounds], admitted: Largest, limits: dict[np.dtype, _Limits], steps: int
    ) -> bool:
        """Whether `steps` steps from these bounds on are covered. If so, the first counts as made."""
        if self._after(begin, admitted, limits, steps) is None:
            return False
        self._begin, self._admitted, self._limits = begin, admitted, limits
        self._steps_made, self._steps_covered = 1, steps if self._rule.slots or self._hosted else ENDLESS
        return True

    def _after(
        self, before: dict[np.dtype, Bounds], admitted: Largest, limits: dict[np.dtype, _Limits], steps: int
    ) -> dict[np.dtype, Bounds] | None:
        """The bounds after `steps` steps of all or some parameters; None if something may exceed its limit."""
        after: dict[np.dtype, Bounds] = {}
        for dtype, bounds in before.items():
            gradient = admitted.get((Operand.GRADIENT, dtype))
            if gradient is None:
                after[dtype] = bounds
                continue
            operands = gradient, admitted.get((Operand.CURVATURE, dtype), 0.0)
            found = self._after_in(dtype, bounds, operands, limits[dtype].update, steps)
            if not (
                found
                and found.parameters <= limits[dtype].parameters
                and all(_largest_magnitude(slot) <= NUMBERS[dtype].most for slot in found.slots)
            ):
                return None
            after[dtype] = found
        return after

    def _after_in(
        self, dtype: np.dtype, before: Bounds, operands: tuple[float, float], most: float, steps: int
    ) -> Bounds | None:
        """The bounds of one dtype after `steps` steps with operands of at most these; None for updates above `most`."""
        if not self._added_decay:
            return self._bounded(dtype, before, operands, most, steps)
        first = self._bounded(dtype, before, self._with_decay(dtype, operands, before.parameters), most, steps)
        if first is None or steps == 1 or first.parameters <= before.parameters:
            return first
        # x grows meanwhile, and the gradients with it: twice as much as at first is assumed, and then has to be shown.
        largest = before.parameters + 2 * (first.parameters - before.parameters)
        found = self._bounded(dtype, before, self._with_decay(dtype, operands, largest), most, steps)
        return found if found and found.parameters <= largest else None

    def _with_decay(self, dtype: np.dtype, operands: tuple[float, float], parameters: float) -> tuple[float, float]:
        """The largest operands after λ x was added to g; infinite if it may be."""
        gradient, curvature = operands
        numbers = NUMBERS[dtype]
        gradient = (gradient + self._added_decay * parameters) * SLACK + numbers.least
        return gradient if gradient <= numbers.most else math.inf, curvature

    def _bounded(
        self, dtype: np.dtype, before: Bounds, operands: tuple[float, float], most: float, steps: int
    ) -> Bounds | None:
        """The same, with operands of the method itself."""
        slack, numbers = SLACK ** min(steps, LOOK_AHEAD[0]), NUMBERS[dtype]
        slots, update = before.slots, 0.0
        if not operands[0] < math.inf:
            return None
        given = Given(numbers, *operands, before.slots, steps)
        for scalars in self._scalars[dtype]:
            found = self._rule.bounds(given, scalars)
            # `not <=` also catches NaN.
            if found is None or not found[0] * slack <= most:
                return None
            update = max(update, found[0] * slack)
            slots = tuple(_widened(*pair, slack, numbers.tiny) for pair in zip(slots, found[1], strict=True))
        return Bounds(slots, (before.parameters + steps * update) * slack if self._hosted else 0.0)


def _distinct(scalars: Mapping[np.dtype, Sequence[Scalars]]) -> dict[np.dtype, list[Scalars]]:
    """Each row once."""
    return {dtype: list(dict.fromkeys(rows)) for dtype, rows in scalars.items()}


def _widened(known: Interval, found: Interval, slack: float, tiny: float) -> Interval:
    """An interval around `known` and `found`, where `found` is widened by what rounding may add."""
    low, high = found
    # A number that is not negative is never rounded to a negative one.
    low = low if low >= 0 else low * slack - tiny
    return min(known[0], low), max(known[1], high * slack + tiny)


def _largest_magnitude(interval: Interval) -> float:
    """The largest magnitude in an interval; NaN if there is one."""
    low, high = interval
    return high if high >= -low else -low


def _limits(dtype: np.dtype, reply_wires: ReplyWires) -> _Limits:
    """The largest magnitudes of updates and x that a dtype and the wires hold."""
    most = NUMBERS[dtype].most
    return _Limits(
        min((half_floats.largest(wire) for wire in reply_wires.updates), default=most),
        min((half_floats.largest(wire) for wire in reply_wires.parameters), default=most),
    )
