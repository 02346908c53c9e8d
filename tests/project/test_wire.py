"""The hand-written encoder writes exactly the bytes of the generated code."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from optserve import wire
from optserve.v1 import steps_pb2

payloads = st.one_of(st.binary(max_size=300), st.integers(0, 40_000).map(bytes))


@given(payloads, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.booleans(), st.text(max_size=64))
def test_encoding_agrees_with_the_generated_code(payload, tensor, offset, last, request_id):
    header = steps_pb2.StreamStepsRequest(chunk=steps_pb2.Chunk(tensor=tensor, offset=offset))
    if last:
        header.commit.SetInParent()
        header.begin.request_id = request_id
    whole = steps_pb2.StreamStepsRequest()
    whole.CopyFrom(header)
    whole.data = payload
    encoded = wire.encode(wire.Frame(header, memoryview(payload)))
    # An empty payload is written out, which proto3's generated code leaves out; both read the same.
    if payload:
        assert encoded == whole.SerializeToString(deterministic=True)
    assert steps_pb2.StreamStepsRequest.FromString(encoded) == whole
    decoded = wire.decode_request(encoded)
    assert bytes(decoded.data or b"") == payload
    assert decoded.header == header


def test_a_frame_without_a_chunk_has_no_payload():
    frame = wire.Frame(steps_pb2.StreamStepsRequest(commit=steps_pb2.Commit()))
    assert wire.decode_request(wire.encode(frame)) == frame


def test_bytes_that_are_no_message_are_refused():
    with pytest.raises(DecodeError):
        wire.decode_response(b"\xff")


@given(st.integers(0, 2**63))
def test_varints(value):
    encoded = wire.varint(value)
    decoded = sum((byte & 0x7F) << (7 * position) for position, byte in enumerate(encoded))
    assert decoded == value
    assert all(byte & 0x80 for byte in encoded[:-1])
    assert not encoded[-1] & 0x80
