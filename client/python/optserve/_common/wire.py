"""Encodes and decodes messages that carry tensors: a small header and a payload, in exactly the bytes of the contract.

`data` has the highest field number of its message and is last on the wire. So the bytes of a message are the bytes of
the header, the tag of the field, its length, and the payload. A received payload can be used where it is. Protobuf
allows other orders of fields too; the generated code decodes those, with two more copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from optserve._common import half_floats
from optserve.v1 import optimizer_pb2, steps_pb2

Buffer = bytes | memoryview

_Header = TypeVar("_Header", bound="_Message")

DATA_FIELD = steps_pb2.StreamStepsRequest.DATA_FIELD_NUMBER
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_FIELDS = 16
"""Most fields that are searched for the payload. Headers of the contract have fewer; for more, the generated code is
faster."""


class _Message(Protocol):
    data: bytes

    def SerializeToString(self) -> bytes: ...  # noqa: N802
    def ClearField(self, field_name: str) -> None: ...  # noqa: N802
    def HasField(self, field_name: Any) -> bool: ...  # noqa: N802


@lru_cache(maxsize=64)  # The payloads of steps have few different sizes.
def varint(value: int) -> bytes:
    """`value`, not negative, as a protobuf varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


COPIED_BYTES = 1 << 15
"""Largest message whose payload is copied."""

_DATA_KEY = DATA_FIELD << 3 | _LENGTH_DELIMITED
_DATA_TAG = varint(_DATA_KEY)


class Frame(NamedTuple, Generic[_Header]):
    """A received message without its payload, and the payload; None if the message has no chunk."""

    header: _Header
    data: Buffer | None = None


RequestFrame = Frame[steps_pb2.StreamStepsRequest]
ResponseFrame = Frame[steps_pb2.StreamStepsResponse]


def encode(header: _Message, *parts: Buffer) -> bytes:
    """The bytes of one message: the fields of the header, then the joined parts as `data`. Copies each part once."""
    head = header.SerializeToString()
    if not parts:
        return head
    return b"".join((head, _DATA_TAG, varint(sum(map(len, parts))), *parts))


def decoder(message: Callable[[], _Header], copied_bytes: int = COPIED_BYTES) -> Callable[[bytes], Frame[_Header]]:
    """A function that decodes the bytes of one message of that type into a frame.

    The payload is a view of the bytes. For at most `copied_bytes` bytes it is a copy, because the generated code is
    faster for these. The function raises google.protobuf.message.DecodeError if the bytes are not a message.
    """
    parse: Callable[[bytes], _Header] = message.FromString  # pyright: ignore[reportFunctionMemberAccess]

    def decode(raw: bytes) -> Frame[_Header]:
        position = _data_position(raw) if len(raw) > copied_bytes else None
        if position is not None:
            tag, begin = position
            header = parse(raw[:tag])
            if header.HasField("chunk"):
                return Frame(header, memoryview(raw)[begin:])
        # Without a chunk, `data` is out of place; it stays in the header, where the caller can see it.
        header = parse(raw)
        if not header.HasField("chunk"):
            return Frame(header)
        data = header.data
        header.ClearField("data")
        return Frame(header, data)

    return decode


def _data_position(raw: bytes) -> tuple[int, int] | None:
    """(position of the tag of `data`, position of its content), if `data` is the last field and appears once.

    Otherwise, and in any doubt, None; then the generated code decodes the message.
    """
    position, end = 0, len(raw)
    for _ in range(_MAX_FIELDS):
        if position >= end:
            return None
        tag_at = position
        key = raw[position]
        position += 1
        if key >= 0x80:
            key, position = _read_varint(raw, tag_at)
        kind = key & 7
        if kind == _LENGTH_DELIMITED:
            if position >= end:
                return None
            size = raw[position]
            position += 1
            if size >= 0x80:
                size, position = _read_varint(raw, position - 1)
            if key == _DATA_KEY:
                return (tag_at, position) if position + size == end else None
            position += size
        elif kind == _VARINT:
            _, position = _read_varint(raw, position)
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            # A group, or an invalid wire type.
            return None
    return None


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    """(value, position after it) of a varint; a position after the end of `raw` if it is not a varint."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        if position >= len(raw):
            break
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return 0, len(raw) + 1


WINDOW_BYTES = 8 << 20
"""Most bytes of a stream on their way to a side that has not taken them yet."""


FRAME_BYTES = 1 << 16
"""Largest frame of HTTP/2 that a side takes. gRPC reads into blocks of this size, and gives Python a separate object
for each frame, or each part of a frame in a block. Frames of the usual 16 KiB cost a tenth of a large step's time."""


HEADER_BYTES = 1 << 12
"""More bytes than a message takes beside its payload. A limit of messages must be larger than a chunk by so much."""


def http2_options() -> list[tuple[str, int]]:
    """The options of a gRPC channel or server that hold WINDOW_BYTES and FRAME_BYTES.

    By default gRPC estimates the window from the times of pings, and on a busy machine takes a hundred MiB for it.
    """
    return [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.max_frame_size", FRAME_BYTES),
    ]


decode_request = decoder(steps_pb2.StreamStepsRequest)
decode_response = decoder(steps_pb2.StreamStepsResponse)

DTYPES: dict[int, np.dtype] = {
    optimizer_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    optimizer_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
"""NumPy dtypes of the contract's data types that state can have."""

WIRE_DTYPES: dict[int, np.dtype] = {
    **DTYPES,
    optimizer_pb2.DATA_TYPE_FLOAT16: half_floats.FLOAT16,
    optimizer_pb2.DATA_TYPE_BFLOAT16: half_floats.BFLOAT16,
}
"""NumPy dtypes of payloads, which can be float16 and bfloat16 too."""

DATA_TYPES: dict[np.dtype, int] = {dtype: value for value, dtype in DTYPES.items()}
"""The reverse of DTYPES."""
