"""Checks the answers to calls about whole optimizers before they are used. `_steps` checks the answers to steps."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from optserve import algorithms
from optserve._common.wire import DTYPES
from optserve._values.settings_messages import method_from
from optserve.errors import InternalError
from optserve.v1 import optimizer_pb2, service_pb2

_YEAR_10000_S = 253_402_300_800


def invalid_reply(what: str) -> InternalError:
    """The error for an answer that the contract does not allow."""
    return InternalError(f"The server's answer is not what the contract allows: {what}.")


def optimizer(message: optimizer_pb2.Optimizer, name: str) -> optimizer_pb2.Optimizer:
    """`message`, after a check that it describes the optimizer with that resource name.

    Raises:
        InternalError: It does not, or it has impossible parameters or slots.
    """
    if message.name != name:
        raise invalid_reply(f"it describes {message.name[:80]!r}, not {name!r}")
    names = {item.name for item in message.parameters}
    if not names or len(names) < len(message.parameters) or "" in names:
        raise invalid_reply(f"{name!r} has no parameters, one without a name, or two of one name")
    for item in message.parameters:
        if item.data_type not in DTYPES:
            raise invalid_reply(f"parameter {item.name!r} has the data type {item.data_type}")
    if len(set(message.slots)) < len(message.slots):
        raise invalid_reply(f"{name!r} has two slots of one name")
    return message


def created(
    message: optimizer_pb2.Optimizer, name: str, wanted: Sequence[optimizer_pb2.Parameter]
) -> optimizer_pb2.Optimizer:
    """`message`, after a check that it describes an optimizer of that resource name, with the wanted parameters."""
    if list(optimizer(message, name).parameters) != list(wanted):
        raise invalid_reply(f"{name!r} was created with other parameters than those of the request")
    return message


def added(
    message: optimizer_pb2.Optimizer, name: str, wanted: Sequence[optimizer_pb2.Parameter]
) -> optimizer_pb2.Optimizer:
    """`message`, after a check that it describes an optimizer of that resource name that has the wanted parameters."""
    found = {item.name: item for item in optimizer(message, name).parameters}
    if any(found.get(item.name) != item for item in wanted):
        raise invalid_reply(f"{name!r} lacks parameters that were added")
    return message


def method(message: optimizer_pb2.Optimizer) -> algorithms.Algorithm:
    """The method of an optimizer.

    Raises:
        FeatureUnavailableError: The server is newer, and this client does not know the method.
    """
    return method_from(message)


def info(message: service_pb2.GetServerInfoResponse) -> service_pb2.GetServerInfoResponse:
    """`message`, after a check of its times."""
    seconds(message.start_time)
    return message


def seconds(time: Timestamp | Duration) -> float:
    """A time since 1970, before the year 10000, or a duration, as seconds."""
    value = time.seconds + time.nanos / 1e9
    if not 0 <= value < _YEAR_10000_S:
        raise invalid_reply(f"a time is {time.seconds} s and {time.nanos} ns")
    return value
