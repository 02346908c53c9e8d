"""The server's error catalogue: one exception and one table of reasons. It does not use gRPC.

The reasons are the names of `optserve.v1.ErrorReason` without their prefix. `edge/status.py` turns an `OptserveError`
into a google.rpc.Status.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto


class Code(Enum):
    """The google.rpc.Code values that the server uses, by their names."""

    INVALID_ARGUMENT = auto()
    NOT_FOUND = auto()
    ALREADY_EXISTS = auto()
    ABORTED = auto()
    FAILED_PRECONDITION = auto()
    RESOURCE_EXHAUSTED = auto()
    UNIMPLEMENTED = auto()
    UNAVAILABLE = auto()
    DATA_LOSS = auto()
    INTERNAL = auto()


class Reason(Enum):
    """Why a call failed."""

    INVALID_FIELD = auto()
    HYPERPARAMETER_OUT_OF_RANGE = auto()
    UNKNOWN_PARAMETER = auto()
    DUPLICATE_PARAMETER = auto()
    WRONG_SHAPE = auto()
    WRONG_DATA_TYPE = auto()
    WRONG_BYTE_COUNT = auto()
    OVERLAPPING_CHUNK = auto()
    MISSING_CHUNK = auto()
    CHUNK_OUT_OF_BOUNDS = auto()
    NON_FINITE_VALUE = auto()
    GRADIENT_OVERFLOW = auto()
    REPLY_OVERFLOW = auto()
    INVALID_PAGE_TOKEN = auto()
    REQUEST_ID_REUSED = auto()
    OPTIMIZER_NOT_FOUND = auto()
    OPTIMIZER_EXISTS = auto()
    WRONG_STEP = auto()
    ETAG_MISMATCH = auto()
    STEP_IN_PROGRESS = auto()
    STEP_TAKEN_OVER = auto()
    REPLY_GONE = auto()
    STATE_REPLACED = auto()
    CHECKPOINT_NOT_FOUND = auto()
    CHECKPOINT_EXISTS = auto()
    CHECKPOINT_MISMATCH = auto()
    CHECKPOINT_DAMAGED = auto()
    NOT_HOSTED = auto()
    PARAMETERS_MISSING = auto()
    PARAMETERS_IN_PLACE = auto()
    WORKER_UNKNOWN = auto()
    GRADIENT_LATE = auto()
    WORKERS_ATTACHED = auto()
    TOO_FEW_WORKERS = auto()
    WORKER_REPLACED = auto()
    STAGING_FULL = auto()
    REPLIES_FULL = auto()
    NOT_OPEN = auto()
    ALREADY_OPEN = auto()
    NO_STEP = auto()
    STEP_NOT_ENDED = auto()
    MESSAGE_TOO_LARGE = auto()
    MODEL_TOO_LARGE = auto()
    SERVER_FULL = auto()
    TOO_MANY_STREAMS = auto()
    TOO_MANY_FRAGMENTS = auto()
    FEATURE_UNAVAILABLE = auto()
    DRAINING = auto()
    NOT_DURABLE = auto()
    CLIENT_GONE = auto()
    STATE_LOST = auto()
    INTERNAL = auto()


CODES: dict[Reason, Code] = {
    Reason.INVALID_FIELD: Code.INVALID_ARGUMENT,
    Reason.HYPERPARAMETER_OUT_OF_RANGE: Code.INVALID_ARGUMENT,
    Reason.UNKNOWN_PARAMETER: Code.INVALID_ARGUMENT,
    Reason.DUPLICATE_PARAMETER: Code.INVALID_ARGUMENT,
    Reason.WRONG_SHAPE: Code.INVALID_ARGUMENT,
    Reason.WRONG_DATA_TYPE: Code.INVALID_ARGUMENT,
    Reason.WRONG_BYTE_COUNT: Code.INVALID_ARGUMENT,
    Reason.OVERLAPPING_CHUNK: Code.INVALID_ARGUMENT,
    Reason.MISSING_CHUNK: Code.INVALID_ARGUMENT,
    Reason.CHUNK_OUT_OF_BOUNDS: Code.INVALID_ARGUMENT,
    Reason.NON_FINITE_VALUE: Code.INVALID_ARGUMENT,
    Reason.GRADIENT_OVERFLOW: Code.INVALID_ARGUMENT,
    Reason.REPLY_OVERFLOW: Code.INVALID_ARGUMENT,
    Reason.INVALID_PAGE_TOKEN: Code.INVALID_ARGUMENT,
    Reason.REQUEST_ID_REUSED: Code.INVALID_ARGUMENT,
    Reason.OPTIMIZER_NOT_FOUND: Code.NOT_FOUND,
    Reason.OPTIMIZER_EXISTS: Code.ALREADY_EXISTS,
    Reason.WRONG_STEP: Code.ABORTED,
    Reason.ETAG_MISMATCH: Code.ABORTED,
    Reason.STEP_IN_PROGRESS: Code.ABORTED,
    Reason.STEP_TAKEN_OVER: Code.ABORTED,
    Reason.REPLY_GONE: Code.FAILED_PRECONDITION,
    Reason.STATE_REPLACED: Code.ABORTED,
    Reason.CHECKPOINT_NOT_FOUND: Code.NOT_FOUND,
    Reason.CHECKPOINT_EXISTS: Code.ALREADY_EXISTS,
    Reason.CHECKPOINT_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.CHECKPOINT_DAMAGED: Code.DATA_LOSS,
    Reason.NOT_HOSTED: Code.FAILED_PRECONDITION,
    Reason.PARAMETERS_MISSING: Code.FAILED_PRECONDITION,
    Reason.PARAMETERS_IN_PLACE: Code.FAILED_PRECONDITION,
    Reason.WORKER_UNKNOWN: Code.FAILED_PRECONDITION,
    Reason.GRADIENT_LATE: Code.ABORTED,
    Reason.WORKERS_ATTACHED: Code.FAILED_PRECONDITION,
    Reason.TOO_FEW_WORKERS: Code.UNAVAILABLE,
    Reason.WORKER_REPLACED: Code.ABORTED,
    Reason.STAGING_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.REPLIES_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.NOT_OPEN: Code.FAILED_PRECONDITION,
    Reason.ALREADY_OPEN: Code.FAILED_PRECONDITION,
    Reason.NO_STEP: Code.FAILED_PRECONDITION,
    Reason.STEP_NOT_ENDED: Code.FAILED_PRECONDITION,
    Reason.MESSAGE_TOO_LARGE: Code.RESOURCE_EXHAUSTED,
    Reason.MODEL_TOO_LARGE: Code.RESOURCE_EXHAUSTED,
    Reason.SERVER_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_STREAMS: Code.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_FRAGMENTS: Code.RESOURCE_EXHAUSTED,
    Reason.FEATURE_UNAVAILABLE: Code.UNIMPLEMENTED,
    Reason.DRAINING: Code.UNAVAILABLE,
    Reason.NOT_DURABLE: Code.UNAVAILABLE,
    Reason.CLIENT_GONE: Code.UNAVAILABLE,
    Reason.STATE_LOST: Code.DATA_LOSS,
    Reason.INTERNAL: Code.INTERNAL,
}

RETRY_AFTER_S: dict[Reason, float] = {
    Reason.STEP_IN_PROGRESS: 0.05,
    Reason.TOO_MANY_STREAMS: 1.0,
    Reason.TOO_FEW_WORKERS: 0.5,
    Reason.STAGING_FULL: 0.5,
    Reason.REPLIES_FULL: 1.0,
    Reason.DRAINING: 1.0,
    Reason.NOT_DURABLE: 1.0,
    Reason.CLIENT_GONE: 0.05,
}
"""Seconds that a client should wait before a retry. After errors with other reasons a retry of the same call is not
worth it."""


class OptserveError(Exception):
    """The error of a call, with a reason that the caller can understand.

    Args:
        reason: The reason, as in the contract.
        message: What is wrong and what the caller can do, in one sentence or two.
        field: Path of the request field that caused the error; empty if no field did.
        metadata: Details for programs, see `ErrorReason` in the contract.
    """

    def __init__(self, reason: Reason, message: str, *, field: str = "", **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def copy(self) -> OptserveError:
        """A new exception with the same content. An exception that is raised twice would keep both tracebacks alive."""
        return OptserveError(self.reason, self.message, field=self.field, **self.metadata)

    @property
    def code(self) -> Code:
        """The status code of the reason."""
        return CODES[self.reason]

    @property
    def retry_after_s(self) -> float | None:
        """Seconds that a client should wait before a retry; None if a retry is not worth it."""
        return RETRY_AFTER_S.get(self.reason)


class renaming_fields:  # noqa: N801 - used as a function; a generator would cost each step some microseconds
    """Replace the `field` of errors that leave the with-block by the path of the field in the request."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OptserveError):
            error.field = self._names.get(error.field, error.field)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError of the with-block into NOT_DURABLE."""
    try:
        yield
    except OSError as error:
        raise OptserveError(
            Reason.NOT_DURABLE,
            f"The server's disk refused: {error.strerror or error}. Nothing was changed; try again when it has room.",
        ) from error
