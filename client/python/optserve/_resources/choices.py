"""Choices that users make by a word: transport, wire dtype and reply."""

from __future__ import annotations

from typing import Literal, get_args

from optserve._rpc.connection import Connection
from optserve.errors import FeatureUnavailableError, InvalidArgumentError
from optserve.v1 import optimizer_pb2, steps_pb2

WireDtype = Literal["native", "float32", "float64", "float16", "bfloat16"]
TransportName = Literal["auto", "grpc", "shm"]
ReplyName = Literal["updates", "parameters", "nothing"]

_WIRE_TYPES = {
    "float32": optimizer_pb2.DATA_TYPE_FLOAT32,
    "float64": optimizer_pb2.DATA_TYPE_FLOAT64,
    "float16": optimizer_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": optimizer_pb2.DATA_TYPE_BFLOAT16,
}
_TRANSPORTS = get_args(TransportName)
_REPLIES = {
    "updates": steps_pb2.REPLY_UPDATES,
    "parameters": steps_pb2.REPLY_PARAMETERS,
    "nothing": steps_pb2.REPLY_NOTHING,
}


def wire_type(wire_dtype: WireDtype) -> optimizer_pb2.DataType:
    """The contract's data type of payloads; raises InvalidArgumentError."""
    if wire_dtype == "native":
        return optimizer_pb2.DATA_TYPE_UNSPECIFIED
    if wire_dtype not in _WIRE_TYPES:
        raise InvalidArgumentError(f"wire_dtype must be native, {', '.join(_WIRE_TYPES)}, not {wire_dtype!r}.")
    return _WIRE_TYPES[wire_dtype]


def reply_of(reply: ReplyName) -> steps_pb2.Reply:
    """The contract's reply; raises InvalidArgumentError."""
    if reply not in _REPLIES:
        raise InvalidArgumentError(f"reply must be one of {', '.join(_REPLIES)}, not {reply!r}.")
    return _REPLIES[reply]


def shares_memory(connection: Connection, transport: TransportName, wire_dtype: WireDtype) -> tuple[bool, bool]:
    """(whether to ask for shared memory, whether to fail without it).

    Raises:
        InvalidArgumentError: There is no such transport, or it does not support that dtype.
        FeatureUnavailableError: The transport is `shm`, and the server is not on this host.
    """
    if transport not in _TRANSPORTS:
        raise InvalidArgumentError(f"transport must be one of {', '.join(_TRANSPORTS)}, not {transport!r}.")
    if transport == "auto":
        transport = connection.config.transport
    if transport == "shm" and wire_dtype != "native":
        raise InvalidArgumentError("In shared memory tensors are not converted; leave wire_dtype at 'native'.")
    if transport == "shm" and not connection.same_host:
        raise FeatureUnavailableError(
            f"Shared memory cannot be used: {connection.target} is not on this host, or belongs to another user."
        )
    return connection.same_host and transport != "grpc" and wire_dtype == "native", transport == "shm"
