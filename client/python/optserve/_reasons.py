"""The reasons of errors that the client compares, by their names in the contract.

Code compares `OptserveError.reason` with these constants, never with a literal. So the import of this module fails for
a name that the contract does not have.
"""

from __future__ import annotations

from optserve.v1 import errors_pb2


def name_of(reason: errors_pb2.ErrorReason) -> str:
    """The text of `OptserveError.reason` for a reason of the contract."""
    return errors_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


CHECKPOINT_DAMAGED = name_of(errors_pb2.ERROR_REASON_CHECKPOINT_DAMAGED)
ETAG_MISMATCH = name_of(errors_pb2.ERROR_REASON_ETAG_MISMATCH)
GRADIENT_LATE = name_of(errors_pb2.ERROR_REASON_GRADIENT_LATE)
INTERNAL = name_of(errors_pb2.ERROR_REASON_INTERNAL)
NOT_DURABLE = name_of(errors_pb2.ERROR_REASON_NOT_DURABLE)
PARAMETERS_IN_PLACE = name_of(errors_pb2.ERROR_REASON_PARAMETERS_IN_PLACE)
PARAMETERS_MISSING = name_of(errors_pb2.ERROR_REASON_PARAMETERS_MISSING)
REPLY_GONE = name_of(errors_pb2.ERROR_REASON_REPLY_GONE)
STATE_REPLACED = name_of(errors_pb2.ERROR_REASON_STATE_REPLACED)
STEP_IN_PROGRESS = name_of(errors_pb2.ERROR_REASON_STEP_IN_PROGRESS)
STEP_TAKEN_OVER = name_of(errors_pb2.ERROR_REASON_STEP_TAKEN_OVER)
TOO_FEW_WORKERS = name_of(errors_pb2.ERROR_REASON_TOO_FEW_WORKERS)
WORKER_REPLACED = name_of(errors_pb2.ERROR_REASON_WORKER_REPLACED)
WORKER_UNKNOWN = name_of(errors_pb2.ERROR_REASON_WORKER_UNKNOWN)
WRONG_STEP = name_of(errors_pb2.ERROR_REASON_WRONG_STEP)
