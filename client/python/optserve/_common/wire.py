"""The codec of the messages that carry tensors: a small header and a payload, as exactly the contract's bytes.

`data` has the highest field number of its message and is last on the wire. So a header's own serialisation followed by
the field's tag, its length and the payload is the serialisation of the whole, and the payload of a message that was
received can be used where it is. Whoever sends otherwise (another order of fields is allowed) is read by the generated
code, with two more copies.
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
"""Fields that are looked through for the payload; a header of ours has fewer, and the generated code is faster."""


class _Message(Protocol):
    data: bytes

    def SerializeToString(self) -> bytes: ...  # noqa: N802
    def ClearField(self, field_name: str) -> None: ...  # noqa: N802
    def HasField(self, field_name: Any) -> bool: ...  # noqa: N802


@lru_cache(maxsize=64)  # The payloads of steps have the same few sizes again and again.
def varint(value: int) -> bytes:
    """`value`, not negative, as a protobuf varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


COPIED_BYTES = 1 << 15
"""Of messages of up to this size, the payload is copied."""

_DATA_KEY = DATA_FIELD << 3 | _LENGTH_DELIMITED
_DATA_TAG = varint(_DATA_KEY)


class Frame(NamedTuple, Generic[_Header]):
    """A received message without its payload, and the payload; None if the message has no chunk."""

    header: _Header
    data: Buffer | None = None


RequestFrame = Frame[steps_pb2.StreamStepsRequest]
ResponseFrame = Frame[steps_pb2.StreamStepsResponse]


def encode(header: _Message, *parts: Buffer) -> bytes:
    """One message: the header's fields, then the parts, joined, as its `data`. Each part is copied once."""
    head = header.SerializeToString()
    if not parts:
        return head
    return b"".join((head, _DATA_TAG, varint(sum(map(len, parts))), *parts))


def decoder(message: Callable[[], _Header], copied_bytes: int = COPIED_BYTES) -> Callable[[bytes], Frame[_Header]]:
    """A function that reads the bytes of one message of that type as a frame.

    The payload is a view of them; a copy if they are no more than `copied_bytes`, because the generated code copies
    those sooner than they are looked through here. It raises google.protobuf.message.DecodeError where they are none.
    """
    parse: Callable[[bytes], _Header] = message.FromString  # pyright: ignore[reportFunctionMemberAccess]

    def decode(raw: bytes) -> Frame[_Header]:
        place = _data_place(raw) if len(raw) > copied_bytes else None
        if place is not None:
            tag, begin = place
            header = parse(raw[:tag])
            if header.HasField("chunk"):
                return Frame(header, memoryview(raw)[begin:])
        # Without a chunk, `data` stays in the header, where it is out of place and can be seen.
        header = parse(raw)
        if not header.HasField("chunk"):
            return Frame(header)
        data = header.data
        header.ClearField("data")
        return Frame(header, data)

    return decode


def _data_place(raw: bytes) -> tuple[int, int] | None:
    """(where the tag of `data` begins, where its content does), if it is the last field and the only one of its number.

    Otherwise None, as for anything that is not certain to be right; the generated code then has the last word.
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
            # A group, or no wire type at all.
            return None
    return None


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    """(value, position behind it) of a varint; a position behind the end of `raw` if it is none."""
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
"""How much of a stream may be on its way to a side that has not taken it yet."""


FRAME_BYTES = 1 << 16
"""Largest frame of HTTP/2 that a side takes. gRPC reads into blocks of this size and gives Python each frame, or part
of one in a block, as an object of its own: frames of the usual 16 KiB cost a tenth of a large step."""


HEADER_BYTES = 1 << 12
"""More than a message takes beside its payload; whoever limits messages leaves so much room beside the chunk."""


def http2_options() -> list[tuple[str, int]]:
    """The options of a gRPC channel or server that hold WINDOW_BYTES and FRAME_BYTES.

    By itself gRPC estimates the window from the times of pings, and on a busy machine takes a hundred MiB for it.
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
"""Those of payloads, which may be halves of float32 as well."""

DATA_TYPES: dict[np.dtype, int] = {dtype: value for value, dtype in DTYPES.items()}
"""The reverse of DTYPES."""
