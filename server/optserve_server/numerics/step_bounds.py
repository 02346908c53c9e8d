"""Whether bounds cover a step, whose constants may differ from those of the step before. See `headroom.py`."""

from __future__ import annotations

from optserve_server.numerics.constants import Constants
from optserve_server.numerics.headroom import Headroom, ReplyWires
from optserve_server.numerics.layout import Largest


class StepBounds:
    """The bounds of one optimizer, for steps with settings of their own too.

    A learning rate that changes at each step would cost new bounds at each step. So the bounds hold for larger rates
    than the present ones, and for all smaller ones.

    Args:
        headroom: Follows the bounds.
    """

    def __init__(self, headroom: Headroom) -> None:
        self._headroom = headroom
        # The bounds are those of `_bounded_by`, and hold for `_bounded`.
        self._bounded_by: Constants
        self._bounded: Constants

    def reset(self) -> None:
        """Forget the bounds: the state was changed by something else than a covered step."""
        self._headroom.reset()

    def set(self, constants: Constants) -> None:
        """Begin anew, with the constants of an optimizer's settings."""
        self._bounded_by = self._bounded = constants
        self._headroom.set(type(constants.settings.rule), constants.first_scalars, constants.added_decay)

    def cover(self, constants: Constants, largest: Largest, reply_wires: ReplyWires) -> bool:
        """Whether bounds show that a step leaves the state and its reply finite. If so, the step counts as made.

        Args:
            constants: The constants of the step.
            largest: See `Headroom.covers`.
            reply_wires: See `Headroom.covers`.
        """
        if constants is not self._bounded:
            if not constants.are_bounded_by(self._bounded_by):
                self._bound_by(constants.with_room())
            self._bounded = constants
        if self._headroom.covers(largest, reply_wires):
            return True
        if self._bounded_by is constants:
            return False
        # The larger rates may have been too large.
        self._bound_by(constants)
        return self._headroom.covers(largest, reply_wires)

    def _bound_by(self, constants: Constants) -> None:
        self._bounded_by = constants
        self._headroom.change(constants.first_scalars, constants.added_decay)
