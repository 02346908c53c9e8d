"""Translates every exception into a google.rpc.Status; nothing else does."""

from __future__ import annotations

import logging
import uuid

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from optserve_server.domain.errors import OptserveError, Reason

logger = logging.getLogger(__name__)

DOMAIN = "optserve.v1"

# Status and details travel in trailers, which gRPC limits to 8 KiB.
_MAX_MESSAGE_BYTES = 1000
_MAX_METADATA_BYTES = 300


def to_status(error: Exception) -> status_pb2.Status:
    """The status of an error, with ErrorInfo and, where they apply, BadRequest and RetryInfo.

    A MemoryError, of the host or of a device, becomes SERVER_FULL, and an unknown exception INTERNAL; the details go to
    the log, not to the client.
    """
    known = error if isinstance(error, OptserveError) else _unknown(error)
    message = _shortened(known.message, _MAX_MESSAGE_BYTES)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=known.reason.name,
            domain=DOMAIN,
            metadata={key: _shortened(value, _MAX_METADATA_BYTES) for key, value in known.metadata.items()},
        )
    ]
    if known.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=known.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if known.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(known.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(known.code.name), message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _shortened(text: str, max_bytes: int) -> str:
    return text.encode(errors="replace")[:max_bytes].decode(errors="ignore")


def _unknown(error: Exception) -> OptserveError:
    incident = uuid.uuid4().hex[:12]
    if isinstance(error, MemoryError):
        logger.warning("incident %s: no memory", incident, exc_info=error)
        return OptserveError(
            Reason.SERVER_FULL,
            f"There is no memory for the call; the server's log has the details under incident {incident}.",
            limit="memory",
        )
    logger.error("incident %s", incident, exc_info=error)
    return OptserveError(
        Reason.INTERNAL, f"The server failed; its log has the details under incident {incident}.", incident=incident
    )
