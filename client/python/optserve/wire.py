"""The codec of the hot messages: a small header and a payload, joined into one message with one copy.

The bytes are exactly those of the contract: `data` has the highest field number of its message, so the header's
own serialisation followed by the field's tag, its length and the payload is the serialisation of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from optserve.v1 import optimizer_pb2, steps_pb2

Buffer = bytes | memoryview

_Header = TypeVar("_Header", bound="_Message")

DATA_FIELD = steps_pb2.StreamStepsRequest.DATA_FIELD_NUMBER
_LENGTH_DELIMITED = 2


class _Message(Protocol):
    data: bytes

    def SerializeToString(self) -> bytes: ...  # noqa: N802
    def ClearField(self, field_name: str) -> None: ...  # noqa: N802
    def HasField(self, field_name: str) -> bool: ...  # noqa: N802


def varint(value: int) -> bytes:
    """`value`, not negative, as a protobuf varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_DATA_TAG = varint(DATA_FIELD << 3 | _LENGTH_DELIMITED)


class Frame(NamedTuple, Generic[_Header]):
    """A stream message without its payload, and the payload; None if the message has no chunk."""

    header: _Header
    data: Buffer | None = None


RequestFrame = Frame[steps_pb2.StreamStepsRequest]
ResponseFrame = Frame[steps_pb2.StreamStepsResponse]


def encode(frame: Frame[_Header]) -> bytes:
    """The frame as the bytes of one protobuf message; the payload is copied once."""
    header = frame.header.SerializeToString()
    if frame.data is None:
        return header
    return b"".join((header, _DATA_TAG, varint(len(frame.data)), frame.data))


def decoder(message: Callable[[], _Header]) -> Callable[[bytes], Frame[_Header]]:
    """A function that parses the bytes of one message of that type into a frame.

    It raises google.protobuf.message.DecodeError where they are none.
    """

    def decode(raw: bytes) -> Frame[_Header]:
        # Without a chunk, `data` stays in the header, where it is out of place and can be seen.
        header = message.FromString(raw)  # pyright: ignore[reportFunctionMemberAccess]
        if not header.HasField("chunk"):
            return Frame(header)
        data = header.data
        header.ClearField("data")
        return Frame(header, data)

    return decode


decode_request = decoder(steps_pb2.StreamStepsRequest)
decode_response = decoder(steps_pb2.StreamStepsResponse)

DTYPES: dict[int, np.dtype] = {
    optimizer_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    optimizer_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
"""NumPy dtypes of the contract's data types, as far as NumPy has them and the service takes them."""

DATA_TYPES: dict[np.dtype, int] = {dtype: value for value, dtype in DTYPES.items()}
"""The reverse."""
