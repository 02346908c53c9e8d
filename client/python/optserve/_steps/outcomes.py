"""What became of the steps of one optimizer whose callers do not know it."""

from __future__ import annotations

from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.gradients import Gradients


class Outcomes:
    """Steps that are unsettled: not known to have been applied or not, or applied without a reply to their caller.

    To be used by one thread at a time, but for `undelivered`.

    Args:
        feedback: The rounding errors, which follow what is known here.

    Attributes:
        unsettled: Their request ids.
        overtaken: Whether a step was applied, has not reached its caller, and was followed by another one, whose reply
            has taken the place of its own.
    """

    def __init__(self, feedback: ErrorFeedback | None = None) -> None:
        self.unsettled: frozenset[str] = frozenset()
        self.overtaken = False
        self._feedback = feedback
        # The last reply that was received, and what was unsettled until then.
        self._received = ""
        self._before: frozenset[str] = frozenset()

    def begin(self, request_id: str, gradients: Gradients) -> None:
        """A step is about to be sent."""
        self.unsettled |= {request_id}
        if self._feedback is not None:
            gradients.rounding = self._feedback.begin(request_id)

    def refused(self, request_id: str) -> None:
        """That step was certainly not applied."""
        self.unsettled -= {request_id}
        if self._feedback is not None:
            self._feedback.refused(request_id)

    def applied(self, request_id: str) -> None:
        """That step was applied, whether or not its caller will know."""
        if self._feedback is not None:
            self._feedback.applied(request_id)

    def received(self, request_id: str) -> None:
        """The reply of that step was received, so nothing is unsettled any more."""
        self._received, self._before, self.unsettled = request_id, self.unsettled, frozenset()

    def undelivered(self, request_id: str = "") -> None:
        """A reply did not reach who had asked for it: all is as unsettled as it was before it was received.

        Args:
            request_id: The step's; the last one's by default.
        """
        if request_id in ("", self._received):
            self.unsettled |= self._before
        else:
            self.overtaken = True

    def forget(self, *, state_is_another: bool) -> None:
        """The caller goes on without knowing; with `state_is_another`, no gradient of before is in it."""
        self.received("")
        self.overtaken = False
        if state_is_another and self._feedback is not None:
            self._feedback.reset()

    @property
    def errors_are_undecided(self) -> bool:
        """Whether rounding errors depend on what has become of a step."""
        return self._feedback is not None and self._feedback.undecided
