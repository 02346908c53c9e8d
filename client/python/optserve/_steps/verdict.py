"""Decides what to do after a failed try of a step, for all errors. `session.py` carries the decision out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from optserve import _reasons
from optserve._rpc.retry import is_retryable
from optserve.errors import InternalError, OptserveError, StateLostError, StepInDoubtError

_NEVER_KNOWN = frozenset((_reasons.WRONG_STEP, _reasons.REPLY_GONE, _reasons.WORKER_REPLACED))
"""Refusals after which the server cannot say whether an earlier try was applied: other clients may have stepped since,
the reply is gone, or another life has the worker's name."""


class Ending(Enum):
    """How a try of a step has failed."""

    NOT_SENT = auto()
    """The try failed before anything of the step was sent, for example while the stream was opened."""
    LOST = auto()
    """The stream cannot be used any more: the connection broke, the time was up, or an answer broke the contract."""
    REFUSED = auto()
    """The server has answered with an error about the step. The stream can be used again."""


class Action(Enum):
    """What the client does next. The first two retry the step, under the same request id."""

    RETRY = auto()
    """Pause, then try again."""
    REGISTER = auto()
    """Pause, register as a worker, then try again."""
    NOT_APPLIED = auto()
    """Raise the error: the step was certainly not applied."""
    IN_DOUBT = auto()
    """Raise StepInDoubtError: nobody can find out any more whether the step was applied."""
    RAISE = auto()
    """Raise the error: the next step first finds out whether this one was applied."""


@dataclass(frozen=True)
class Verdict:
    """The decision after a failed try.

    Attributes:
        action: What the client does next.
        in_doubt: Whether this try or an earlier one may have applied the step.
        closes_stream: Whether the client closes a stream that it could use again.
    """

    action: Action
    in_doubt: bool
    closes_stream: bool


def judge(error: OptserveError, ending: Ending, *, in_doubt: bool, can_register: bool) -> Verdict:
    """Decide what to do after a failed try.

    Args:
        error: The error of the try.
        ending: How the try has failed.
        in_doubt: Whether an earlier try may have applied the step.
        can_register: Whether this client is a worker, which can register once more.
    """
    # The server takes a step over that makes no progress, and also one that was applied and whose reply is read too
    # slowly. Or a later stream was opened, and the server takes no more steps from this one.
    taken_over = error.reason == _reasons.STEP_TAKEN_OVER
    if ending is Ending.LOST:
        in_doubt = True
    elif ending is Ending.REFUSED:
        # Only these refusals may come after the step was applied, or before it is.
        in_doubt |= taken_over or _may_be_found_made(error) or isinstance(error, InternalError | StateLostError)
    action = next_try(error, can_register=can_register)
    if action is None:
        if taken_over:
            action = Action.RETRY
        elif not in_doubt:
            action = Action.NOT_APPLIED
        elif is_never_known(error):
            action = Action.IN_DOUBT
        else:
            action = Action.RAISE
    return Verdict(action, in_doubt, closes_stream=taken_over)


def _may_be_found_made(error: OptserveError) -> bool:
    """Whether the server's disk keeps a step that was refused, which the server's next start may find and apply."""
    return error.reason == _reasons.NOT_DURABLE and error.metadata.get("in_doubt") == "true"


def is_never_known(error: OptserveError) -> bool:
    """Whether, after that error, nobody can be asked what became of a step that an earlier try may have applied."""
    return error.reason in _NEVER_KNOWN


def never_known(name: str, error: OptserveError) -> StepInDoubtError:
    """The error for a step of the optimizer of that name, where nobody can be asked what became of an earlier try."""
    return StepInDoubtError(
        f"The connection was lost in the middle of a step of {name}. Then the server answered: {error.message} "
        "Whether the step was applied is no longer known. Call refresh() to go on."
    )


def next_try(error: OptserveError, *, can_register: bool) -> Action | None:
    """RETRY or REGISTER if the same call may succeed then, else None."""
    if can_register and error.reason == _reasons.WORKER_UNKNOWN:
        # The server was restarted, or the worker's last report is too old.
        return Action.REGISTER
    return Action.RETRY if is_retryable(error) else None


class NotApplied(Exception):
    """The server has refused a step, which was certainly not applied; `error` says why."""

    def __init__(self, error: OptserveError) -> None:
        super().__init__(error)
        self.error = error
