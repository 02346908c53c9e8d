"""What a step has done, as the contract shows it."""

from __future__ import annotations

from optserve._common.wire import encode
from optserve.v1 import steps_pb2
from optserve_server.engine.transaction import Outcome, ReplyChunk

MAX_LEARNING_RATES = 257
"""Most learning rates of a result, which may share a message with a chunk; see `wire.HEADER_BYTES`."""


def set_result(result: steps_pb2.Result, outcome: Outcome) -> None:
    """Show a step's outcome as the contract does."""
    result.request_id, result.step = outcome.request_id, outcome.step
    if outcome.replayed:
        result.replayed = True
    if outcome.staleness:
        result.staleness = outcome.staleness
    norm, learning_rates, clipped = outcome.effect
    if norm is not None:
        result.gradient_norm = norm
    if learning_rates and len(learning_rates) <= MAX_LEARNING_RATES:
        result.learning_rates.extend(learning_rates)
    if clipped is not None:
        result.clipped = clipped


def reply_message(piece: ReplyChunk, last: steps_pb2.StreamStepsResponse) -> bytes:
    """A piece of a step's reply as a message of its stream; the last piece goes with the result, which `last` has."""
    header = last if piece.last else steps_pb2.StreamStepsResponse()
    chunk = header.chunk
    chunk.tensor, chunk.offset = piece.tensor, piece.offset
    chunk.SetInParent()
    return encode(header, piece.data)
