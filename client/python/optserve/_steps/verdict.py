"""What is done after a try of a step that has failed: one table for all errors.

It decides and does nothing; `session.py` carries out what it says. Whether a try that succeeded is believed is not
decided here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from optserve import _reasons
from optserve._rpc.retry import is_retryable
from optserve.errors import InternalError, OptserveError, StateLostError

_NEVER_KNOWN = frozenset((_reasons.WRONG_STEP, _reasons.REPLY_GONE, _reasons.WORKER_REPLACED))
"""Refusals of a step that an earlier try may have applied, after which the server cannot be asked what became of it:
others may have stepped since, the reply is gone, or the worker's name is another life's."""


class Ending(Enum):
    """How a try of a step has ended without a result."""

    NOT_SENT = auto()
    """Before anything of the step was sent, as while a stream was opened."""
    LOST = auto()
    """The stream is of no further use: the connection broke, time was up, or an answer was not what it must be."""
    REFUSED = auto()
    """The server has answered with an error about the step, and the stream can be used again."""


class Action(Enum):
    """What is done next. The first two try the step again under the same request id, by which it is the same step."""

    RETRY = auto()
    """Pause, then try again."""
    REGISTER = auto()
    """Pause, register as a worker, then try again."""
    NOT_APPLIED = auto()
    """Raise the error: the step was certainly not applied."""
    IN_DOUBT = auto()
    """Raise StepInDoubtError: whether the step was applied can no longer be found out."""
    RAISE = auto()
    """Raise the error: before the next step it is found out whether this one was applied."""


@dataclass(frozen=True)
class Verdict:
    """What a failed try leads to.

    Attributes:
        action: What is done next.
        in_doubt: Whether the step may have been applied, by this try or an earlier one.
        closes_stream: Whether the stream is closed although it can be used again.
    """

    action: Action
    in_doubt: bool
    closes_stream: bool


def judge(error: OptserveError, ending: Ending, *, in_doubt: bool, can_register: bool) -> Verdict:
    """What is done after a failed try.

    Args:
        error: What the try has failed with.
        ending: How it has ended.
        in_doubt: Whether an earlier try may have applied the step.
        can_register: Whether this client makes steps as a worker, which can be registered again.
    """
    # A step that has not moved for long is taken over; so is a reply that was read too slowly, of a step that was
    # applied. Perhaps a later stream was opened: then no step by this one counts any more.
    taken_over = error.reason == _reasons.STEP_TAKEN_OVER
    if ending is Ending.LOST:
        in_doubt = True
    elif ending is Ending.REFUSED:
        # Of all refusals only these may come after the step was applied.
        in_doubt |= taken_over or isinstance(error, InternalError | StateLostError)
    action = next_try(error, can_register=can_register)
    if action is None:
        if taken_over:
            action = Action.RETRY
        elif not in_doubt:
            action = Action.NOT_APPLIED
        elif error.reason in _NEVER_KNOWN:
            action = Action.IN_DOUBT
        else:
            action = Action.RAISE
    return Verdict(action, in_doubt, closes_stream=taken_over)


def next_try(error: OptserveError, *, can_register: bool) -> Action | None:
    """RETRY or REGISTER if the same call may succeed after that, else None."""
    if can_register and error.reason == _reasons.WORKER_UNKNOWN:
        # The server was started anew, or has not heard of this worker for long.
        return Action.REGISTER
    return Action.RETRY if is_retryable(error) else None


class NotApplied(Exception):
    """A step was refused, and certainly not applied; `error` says why."""

    def __init__(self, error: OptserveError) -> None:
        super().__init__(error)
        self.error = error
