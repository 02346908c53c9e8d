"""All exceptions of the client, and the code that turns a google.rpc.Status into one of them.

OptserveError
├── UnavailableError            no server answers, or the server is about to stop
│   ├── TooFewWorkersError      a step needs more workers than are alive
│   └── UnreachableError        no try before the deadline has reached a server (also a DeadlineExceededError)
├── DeadlineExceededError       no answer in time; the step may or may not have been applied
├── StepCancelledError          the step was cancelled; it may or may not have been applied
├── InvalidArgumentError        a value, name, shape or dtype is wrong (also a ValueError)
├── NotFoundError               no such optimizer or checkpoint (also a KeyError)
├── AlreadyExistsError          the name is taken
├── AbortedError
│   ├── WrongStepError          the server is at another step than the client
│   ├── GradientLateError       a step was applied without a worker's gradient
│   ├── EtagMismatchError       the optimizer was changed meanwhile
│   ├── WorkerReplacedError     another life of this worker has begun, under the same name
│   ├── StateReplacedError      the state was restored or imported, or belongs to a new optimizer of the same name
│   └── StepInProgressError     another client is in the middle of a step
├── FailedPreconditionError
│   ├── StepInDoubtError        a step whose call was interrupted has, or may have, been applied
│   └── StepsLostError          the server has come back with fewer steps than this client has seen
├── ResourceExhaustedError      too large, too many, or no memory
├── FeatureUnavailableError     this server, or this client, lacks that part of the contract
├── StateLostError              the server's device failed; the optimizer's state may be wrong
├── CheckpointDamagedError      the checkpoint's file on the server is damaged; the optimizer is as it was
├── InternalError               a fault of the server, or an answer that the contract does not allow
└── ClientUseError              this object is closed, or was inherited by a forked process
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
        message: What is wrong, and what to do about it.
        reason: The server's `ErrorReason` without its prefix; empty if the error does not come from a server.
        metadata: Details of the reason, such as `parameter`, `index` or `current_step`.
        field: Path of the request field that caused the error; empty if no field did.
        retry_after_s: Seconds after which a retry of the same call is worth it; None if it is not.
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
    """No server answers, or the server is about to stop."""


class TooFewWorkersError(UnavailableError):
    """A step needs the gradients of more workers than are alive, and no others came before the deadline.

    The message names the live workers and the dead ones. The step was not applied.
    """


class DeadlineExceededError(OptserveError):
    """No answer came in time. A step may or may not have been applied; the next step finds out."""


class UnreachableError(UnavailableError, DeadlineExceededError):
    """No server was reached before the deadline, or the connection was lost. The message has the last try's error.

    A step may or may not have been applied; the next step finds out.
    """


class StepCancelledError(OptserveError):
    """The step was cancelled. It may or may not have been applied; the next step finds out."""


class InvalidArgumentError(OptserveError, ValueError):
    """A value, name, shape or dtype is wrong. Nothing was changed."""


class NotFoundError(OptserveError, KeyError):
    """There is no such optimizer or checkpoint."""


class AlreadyExistsError(OptserveError):
    """The name is taken."""


class AbortedError(OptserveError):
    """The call does not fit the present state of the optimizer. Nothing was changed."""


class GradientLateError(AbortedError):
    """A step was applied without this worker's gradient. Pull, and compute another gradient."""


class WrongStepError(AbortedError):
    """The server is at another step than the client; `current_step` is the server's step."""

    @property
    def current_step(self) -> int:
        """Steps that the server has applied."""
        return int(self.metadata["current_step"])


class EtagMismatchError(AbortedError):
    """The optimizer was changed since this client last read it."""


class WorkerReplacedError(AbortedError):
    """This life of a worker is over, because another life has begun under the same name. Its step was not applied.

    It makes no more steps, even when the other life has ended. To go on, enter a new `Client.worker`.
    """


class StateReplacedError(AbortedError):
    """The state is not the one that this client knew: it was restored or imported, or belongs to a new optimizer.

    To go on with the new state, call `Optimizer.refresh`.
    """


class StepInProgressError(AbortedError):
    """Another client is in the middle of a step on this optimizer."""


class FailedPreconditionError(OptserveError):
    """The call is not possible in the present state of the optimizer."""


class StepInDoubtError(FailedPreconditionError):
    """A step whose call was interrupted has, or may have, been applied, and its updates have not arrived.

    The message says which of the two. `Optimizer.replay` receives the updates as long as the server has them. To go on
    without them, call `Optimizer.refresh`.
    """


class StepsLostError(FailedPreconditionError):
    """The server has come back with fewer steps than this client has seen: its state was not durable.

    Nothing was changed. To go on from the server's step, call `Optimizer.refresh`.
    """


class ResourceExhaustedError(OptserveError):
    """The request is too large, there are too many, or the server has no memory for it."""


class FeatureUnavailableError(OptserveError, NotImplementedError):
    """This server, or this client, lacks a part of the contract."""


class StateLostError(OptserveError):
    """The server's device failed in the middle of a step, so the optimizer's state may be wrong."""


class CheckpointDamagedError(OptserveError):
    """The checkpoint's file on the server is damaged. The optimizer is as it was."""


class InternalError(OptserveError):
    """A fault of the server: it failed, or its answer is not what the contract allows.

    With the reason INTERNAL the server's log has details under `metadata["incident"]`. The client uses no part of a bad
    answer. The step of such an answer may or may not have been applied; the next step finds out.
    """


class ClientUseError(OptserveError, RuntimeError):
    """This object is closed, or belongs to the process from which this process was forked."""


_BY_CODE: dict[int, type[OptserveError]] = {
    # An error with the code OK contradicts itself.
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
    """The exception for a status, with those of its details that can be decoded."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    retryable = False
    for detail in status.details:
        try:
            # Unpack does nothing if the type differs.
            detail.Unpack(info)
            detail.Unpack(bad_request)
            retryable |= detail.Unpack(retry)
        except DecodeError as error:
            logger.debug("a detail of an error is not a %s: %s", detail.type_url, error)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(status.code, OptserveError)
    if kind is WrongStepError and not _STEP.fullmatch(info.metadata.get("current_step", "")):
        # A WrongStepError needs the step.
        kind = AbortedError
    return kind(
        status.message,
        reason=info.reason,
        metadata=info.metadata,
        field=bad_request.field_violations[0].field if bad_request.field_violations else "",
        retry_after_s=max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0) if retryable else None,
    )


_TOO_MANY_CALLS = "Concurrent RPC limit exceeded"
"""The message with which gRPC itself refuses a call beyond its `maximum_concurrent_rpcs`, without a retry hint."""

_BUSY_RETRY_S = 0.5

_KEY_TYPES = "RSA, or elliptic curve P-256 or P-384"
"""The types that gRPC's TLS takes."""

_TLS_FAILURES = {
    "CERTIFICATE_VERIFY_FAILED": "the authority that this client trusts has not signed the server's certificate, or it "
    "is not valid now; or the server does not send the certificates between the two",
    "Hostname Verification Check failed": "the server's certificate is for another name; `server_name` says which",
    "WRONG_VERSION_NUMBER": "that server does not speak TLS",
    "NO_COMMON_SIGNATURE_ALGORITHMS": f"this client's key is of another type than {_KEY_TYPES}",
    "Failed to create security handshaker": "gRPC does not take this client's certificate; its key must be of the type "
    f"{_KEY_TYPES}",
}
"""What gRPC says of a handshake that has failed, and what it means."""

_CLOSED = "Socket closed"


def _unreachable(target: str, details: str) -> str:
    for sign, meaning in _TLS_FAILURES.items():
        if sign in details:
            return f"{target} was not reached over TLS: {meaning} ({details})."
    tls = " It may ask for TLS, or for a client's certificate." if _CLOSED in details else ""
    return f"No optserve server answers at {target} ({details}). Is it running? `optserve serve` starts one.{tls}"


def from_rpc_error(error: grpc.RpcError, target: str, hint: str = "") -> OptserveError:
    """The exception for a failed call to `target`; `hint` is a further possible reason why no server was reached."""
    if not isinstance(error, grpc.Call):
        return InternalError(f"The call to {target} failed: {error}")
    for item in error.trailing_metadata() or ():
        if item.key == _DETAILS_KEY and isinstance(item.value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(item.value))
            except DecodeError as unreadable:
                logger.debug("the details of an error are not a Status: %s", unreadable)
    code = code_pb2.Code.Value(error.code().name)
    if code == code_pb2.UNAVAILABLE:
        message = _unreachable(target, error.details() or "") + hint
    elif _TOO_MANY_CALLS in (error.details() or ""):
        busy = f"{target} has as many calls as it takes at a time; try again later."
        return ResourceExhaustedError(busy, retry_after_s=_BUSY_RETRY_S)
    else:
        message = f"{error.details()} ({error.code().name}, from {target})"
    return from_status(status_pb2.Status(code=code, message=message))
