"""The hand-written codec writes and reads exactly what the generated code does, whatever is on the wire."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from optserve._common import wire
from optserve.v1 import checkpoints_pb2, steps_pb2

Request = steps_pb2.StreamStepsRequest

DECODERS = [wire.decode_request, wire.decoder(Request, copied_bytes=0)]
"""As it is, and with messages of every size looked through."""

payloads = st.one_of(st.binary(max_size=300), st.integers(0, 40_000).map(bytes))


@given(
    st.lists(payloads, max_size=3),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.text(max_size=64),
)
def test_encoding_agrees_with_the_generated_code(parts, tensor, offset, last, request_id):
    header = Request(chunk=steps_pb2.Chunk(tensor=tensor, offset=offset))
    if last:
        header.commit.SetInParent()
        header.begin.request_id = request_id
    whole = Request()
    whole.CopyFrom(header)
    whole.data = b"".join(parts)
    encoded = wire.encode(header, *map(memoryview, parts))
    # An empty payload is written out, which proto3's generated code leaves out; both read the same.
    if whole.data:
        assert encoded == whole.SerializeToString(deterministic=True)
    assert Request.FromString(encoded) == whole
    for decode in DECODERS:
        decoded = decode(encoded)
        assert bytes(decoded.data or b"") == whole.data
        assert decoded.header == header


def test_a_payload_that_is_last_is_not_copied():
    raw = wire.encode(Request(chunk=steps_pb2.Chunk(tensor=1)), bytes(wire.COPIED_BYTES))
    data = wire.decode_request(raw).data
    assert isinstance(data, memoryview)
    assert data.obj is raw


def test_a_message_without_a_chunk_has_no_payload():
    header = Request(commit=steps_pb2.Commit())
    assert wire.decode_request(wire.encode(header)) == wire.Frame(header)


def test_bytes_that_are_no_message_are_refused():
    with pytest.raises(DecodeError):
        wire.decode_response(b"\xff")


# --- Whatever is on the wire


def long_varint(value: int, extra: int) -> bytes:
    """A varint with bytes more than it needs, which is allowed up to ten."""
    encoded = bytearray(wire.varint(value))
    while extra and len(encoded) < 10:
        encoded[-1] |= 0x80
        encoded.append(0)
        extra -= 1
    return bytes(encoded)


@st.composite
def fields(draw) -> bytes:
    """One field: of the contract, of its numbers in another type, or of a number that is none."""
    number = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 77, 2047, 2047, 2047, 5000]))
    kind = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 5]))
    extra = draw(st.integers(0, 3))
    tag = long_varint(number << 3 | kind, extra)
    if kind == 0:
        return tag + long_varint(draw(st.integers(0, 2**64 - 1)), extra)
    if kind in (1, 5):
        return tag + draw(st.binary(min_size=8 if kind == 1 else 4, max_size=8 if kind == 1 else 4))
    content = draw(payloads)
    if number == 3:
        content = steps_pb2.Chunk(
            tensor=draw(st.integers(0, 300)), offset=draw(st.integers(0, 2**40))
        ).SerializeToString()
    elif number == 2 and draw(st.booleans()):
        content = steps_pb2.Begin(request_id=draw(st.text(max_size=5))).SerializeToString()
    elif number in (4, 5) and draw(st.booleans()):
        content = b""
    return tag + long_varint(len(content), extra) + content


def whole(frame: wire.Frame) -> bytes:
    """A frame as the generated code would have read it."""
    message = type(frame.header)()
    message.CopyFrom(frame.header)
    if frame.data is not None:
        message.data = bytes(frame.data)
    return message.SerializeToString(deterministic=True)


@given(
    st.lists(fields(), max_size=6),
    st.integers(0, 30),
    st.sampled_from([Request, checkpoints_pb2.ImportStateRequest]),
    st.sampled_from([0, wire.COPIED_BYTES]),
)
def test_any_order_unknown_fields_split_varints_and_truncation(parts, cut, kind, copied_bytes):
    raw = b"".join(parts)
    raw = raw[: len(raw) - cut] if cut < 15 else raw
    try:
        expected = kind.FromString(raw).SerializeToString(deterministic=True)
    except DecodeError:
        with pytest.raises(DecodeError):
            wire.decoder(kind, copied_bytes)(raw)
        return
    assert whole(wire.decoder(kind, copied_bytes)(raw)) == expected


@given(st.binary(max_size=200), st.sampled_from(DECODERS))
def test_noise(raw, decode):
    try:
        expected = Request.FromString(raw).SerializeToString(deterministic=True)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode(raw)
        return
    assert whole(decode(raw)) == expected


@given(st.integers(0, 2**63))
def test_varints(value):
    encoded = wire.varint(value)
    decoded = sum((byte & 0x7F) << (7 * position) for position, byte in enumerate(encoded))
    assert decoded == value
    assert all(byte & 0x80 for byte in encoded[:-1])
    assert not encoded[-1] & 0x80
