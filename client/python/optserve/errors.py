"""Everything the client raises, and the one place where a google.rpc.Status becomes an exception.

OptserveError
├── UnavailableError            no server answers, or it is about to stop
│   ├── TooFewWorkersError      a step takes more workers than are alive
│   └── UnreachableError        no try until the deadline has reached a server (also a DeadlineExceededError)
├── DeadlineExceededError       no answer in time; the step may or may not have been applied
├── StepCancelledError          the step was cancelled; it may or may not have been applied
├── InvalidArgumentError        a value, name, shape or dtype that cannot be used (also a ValueError)
├── NotFoundError               no such optimizer or checkpoint (also a KeyError)
├── AlreadyExistsError          the name is taken
├── AbortedError
│   ├── WrongStepError          the server is at another step than the client
│   ├── GradientLateError       a step has gone on without a worker's gradient
│   ├── EtagMismatchError       the optimizer was changed meanwhile
│   ├── WorkerReplacedError     another life of this worker has begun, under the same name
│   ├── StateReplacedError      the state is another one than this client knew: restored, imported, or a new optimizer's
│   └── StepInProgressError     another client is in the middle of a step
├── FailedPreconditionError
│   ├── StepInDoubtError        a step whose call was interrupted has, or may have, been applied
│   └── StepsLostError          the server has come back with fewer steps than this client has seen
├── ResourceExhaustedError      too large, too many, or no room
├── FeatureUnavailableError     this server, or this client, lacks that part of the contract
├── StateLostError              the server's device failed; the optimizer's state is gone
├── CheckpointDamagedError      the checkpoint's file on the server is damaged; the optimizer is as it was
├── InternalError               a fault of the server, or an answer that the contract does not allow
└── ClientUseError              this object cannot be used here: closed, or inherited by a forked process
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from optserve import _reasons

logger = logging.getLogger(__name__)

_DETAILS_KEY = "grpc-status-details-bin"
_STEP = re.compile("[0-9]{1,20}")


class OptserveError(Exception):
    """The root of this package's exceptions.

    Attributes:
        message: What is wrong and what to do about it.
        reason: The server's `ErrorReason` without its prefix; empty where the error arose elsewhere.
        metadata: Particulars of the reason, such as `parameter`, `index` or `current_step`.
        field: Path of the offending field of the request; empty if there is none.
        retry_after_s: Seconds after which the same call is worth another try; None if it is not.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]" if self.reason else self.message


class UnavailableError(OptserveError):
    """No server answers, or it is about to stop."""


class TooFewWorkersError(UnavailableError):
    """A step needs the gradients of more workers than are alive, and no others came before the deadline.

    The message says which are alive and which have been. The step was not applied.
    """


class DeadlineExceededError(OptserveError):
    """No answer came in time. A step may or may not have been applied; the next one finds out."""


class UnreachableError(UnavailableError, DeadlineExceededError):
    """No server was reached before the deadline, or the connection was lost. The message has the last try's error.

    A step may or may not have been applied; the next one finds out.
    """


class StepCancelledError(OptserveError):
    """The step was cancelled. It may or may not have been applied; the next one finds out."""


class InvalidArgumentError(OptserveError, ValueError):
    """A value, name, shape or dtype that cannot be used. Nothing was changed."""


class NotFoundError(OptserveError, KeyError):
    """There is no such optimizer or checkpoint."""


class AlreadyExistsError(OptserveError):
    """The name is taken."""


class AbortedError(OptserveError):
    """The call does not fit the present state of the optimizer. Nothing was changed."""


class GradientLateError(AbortedError):
    """A step has gone on without this worker's gradient, which was not applied. Pull, and compute another."""


class WrongStepError(AbortedError):
    """The server is at another step than the client; `current_step` says at which."""

    @property
    def current_step(self) -> int:
        """Steps that the server has applied."""
        return int(self.metadata["current_step"])


class EtagMismatchError(AbortedError):
    """The optimizer was changed since this client last read it."""


class WorkerReplacedError(AbortedError):
    """This life of a worker is over: another has begun under the same name. Its step was not applied.

    It makes no steps any more, whatever becomes of the other one; to go on, enter a new `Client.worker`.
    """


class StateReplacedError(AbortedError):
    """The optimizer's state is another one than this client knew: restored, imported, or that of a new optimizer.

    `Optimizer.refresh` goes on with it, if that is wanted.
    """


class StepInProgressError(AbortedError):
    """Another client is in the middle of a step on this optimizer."""


class FailedPreconditionError(OptserveError):
    """The call came at the wrong time."""


class StepInDoubtError(FailedPreconditionError):
    """A step whose call was interrupted has, or may have, been applied, and its updates have not arrived.

    The message says which. `Optimizer.replay` gets the updates as long as the server has them; `Optimizer.refresh`
    goes on without them.
    """


class StepsLostError(FailedPreconditionError):
    """The server has come back with fewer steps than this client has seen: its state was not durable.

    Nothing was changed. `Optimizer.refresh` goes on from the server's step, if that is wanted.
    """


class ResourceExhaustedError(OptserveError):
    """Too large, too many, or no room left on the server."""


class FeatureUnavailableError(OptserveError, NotImplementedError):
    """This server, or this client, lacks that part of the contract."""


class StateLostError(OptserveError):
    """The server's device failed in the middle of a step; the optimizer's state is not to be trusted."""


class CheckpointDamagedError(OptserveError):
    """The checkpoint's file on the server is damaged. The optimizer is as it was."""


class InternalError(OptserveError):
    """A fault of the server: it failed, or its answer is not what the contract allows.

    With the reason INTERNAL its log has the particulars under `metadata["incident"]`. Nothing of a bad answer is used;
    a step that it came to may or may not have been applied, and the next one finds out.
    """


class ClientUseError(OptserveError, RuntimeError):
    """This object cannot be used here: it is closed, or belongs to the process that this one was forked from."""


_BY_CODE: dict[int, type[OptserveError]] = {
    # An error that says that all is well.
    code_pb2.OK: InternalError,
    code_pb2.CANCELLED: UnavailableError,
    code_pb2.INVALID_ARGUMENT: InvalidArgumentError,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceededError,
    code_pb2.NOT_FOUND: NotFoundError,
    code_pb2.ALREADY_EXISTS: AlreadyExistsError,
    code_pb2.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    code_pb2.FAILED_PRECONDITION: FailedPreconditionError,
    code_pb2.ABORTED: AbortedError,
    code_pb2.UNIMPLEMENTED: FeatureUnavailableError,
    code_pb2.INTERNAL: InternalError,
    code_pb2.UNAVAILABLE: UnavailableError,
    code_pb2.DATA_LOSS: StateLostError,
}
_BY_REASON: dict[str, type[OptserveError]] = {
    _reasons.GRADIENT_LATE: GradientLateError,
    _reasons.TOO_FEW_WORKERS: TooFewWorkersError,
    _reasons.WORKER_REPLACED: WorkerReplacedError,
    _reasons.WRONG_STEP: WrongStepError,
    _reasons.ETAG_MISMATCH: EtagMismatchError,
    _reasons.STATE_REPLACED: StateReplacedError,
    _reasons.STEP_IN_PROGRESS: StepInProgressError,
    _reasons.CHECKPOINT_DAMAGED: CheckpointDamagedError,
}


def from_status(status: status_pb2.Status) -> OptserveError:
    """The exception for a status, with what those of its details say that can be read."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    retryable = False
    for detail in status.details:
        try:
            # Unpack does nothing where the type is another.
            detail.Unpack(info)
            detail.Unpack(bad_request)
            retryable |= detail.Unpack(retry)
        except DecodeError as error:
            logger.debug("a detail of an error is no %s: %s", detail.type_url, error)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(status.code, OptserveError)
    if kind is WrongStepError and not _STEP.fullmatch(info.metadata.get("current_step", "")):
        # Without the step it is none of those whose step can be asked for.
        kind = AbortedError
    return kind(
        status.message,
        reason=info.reason,
        metadata=info.metadata,
        field=bad_request.field_violations[0].field if bad_request.field_violations else "",
        retry_after_s=max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0) if retryable else None,
    )


_TOO_MANY_CALLS = "Concurrent RPC limit exceeded"
"""How gRPC itself, which knows nothing of advice, refuses a call beyond its `maximum_concurrent_rpcs`."""

_BUSY_RETRY_S = 0.5


def from_rpc_error(error: grpc.RpcError, target: str, hint: str = "") -> OptserveError:
    """The exception for a failed call to `target`; `hint` says what else may keep a server from being reached."""
    if not isinstance(error, grpc.Call):
        return InternalError(f"The call to {target} failed: {error}")
    for item in error.trailing_metadata() or ():
        if item.key == _DETAILS_KEY and isinstance(item.value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(item.value))
            except DecodeError as unreadable:
                logger.debug("the details of an error are no Status: %s", unreadable)
    code = code_pb2.Code.Value(error.code().name)
    if code == code_pb2.UNAVAILABLE:
        message = (
            f"No optserve server answers at {target} ({error.details()}). Is it running? `optserve serve` starts one."
            + hint
        )
    elif _TOO_MANY_CALLS in (error.details() or ""):
        busy = f"{target} has as many calls as it takes at a time; try again later."
        return ResourceExhaustedError(busy, retry_after_s=_BUSY_RETRY_S)
    else:
        message = f"{error.details()} ({error.code().name}, from {target})"
    return from_status(status_pb2.Status(code=code, message=message))
