"""Steps of one optimizer whose callers do not know whether they were applied."""

from __future__ import annotations

from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.gradients import Gradients


class Outcomes:
    """The unsettled steps: those that may have been applied, and those whose reply has not reached the caller.

    All methods but `undelivered` are for one thread at a time.

    Args:
        feedback: The rounding errors, which change with the steps that were applied.

    Attributes:
        unsettled: Request ids of the unsettled steps.
        overtaken: Whether an unsettled step was applied, and the reply of a later step has replaced its reply.
    """

    def __init__(self, feedback: ErrorFeedback | None = None) -> None:
        self.unsettled: frozenset[str] = frozenset()
        self.overtaken = False
        self._feedback = feedback
        # Request id of the last reply that was received, and the steps that were unsettled before it.
        self._received = ""
        self._before: frozenset[str] = frozenset()

    def begin(self, request_id: str, gradients: Gradients) -> None:
        """Begin to send a step."""
        self.unsettled |= {request_id}
        if self._feedback is not None:
            gradients.rounding = self._feedback.begin(request_id)

    def refused(self, request_id: str) -> None:
        """The step was certainly not applied."""
        self.unsettled -= {request_id}
        if self._feedback is not None:
            self._feedback.refused(request_id)

    def applied(self, request_id: str) -> None:
        """The step was applied; its reply may still be lost."""
        if self._feedback is not None:
            self._feedback.applied(request_id)

    def received(self, request_id: str) -> None:
        """The reply of the step was received, so no step is unsettled any more."""
        self._received, self._before, self.unsettled = request_id, self.unsettled, frozenset()

    def undelivered(self, request_id: str = "") -> None:
        """The reply did not reach the caller: the steps that were unsettled before it are unsettled once more.

        Args:
            request_id: The step's; that of the last reply by default.
        """
        if request_id in ("", self._received):
            self.unsettled |= self._before
        else:
            self.overtaken = True

    def forget(self, *, state_is_another: bool) -> None:
        """Forget all unsettled steps. With `state_is_another`, the state has none of the gradients sent before."""
        self.received("")
        self.overtaken = False
        if state_is_another and self._feedback is not None:
            self._feedback.reset()

    @property
    def errors_are_undecided(self) -> bool:
        """Whether rounding errors depend on an unsettled step."""
        return self._feedback is not None and self._feedback.undecided
