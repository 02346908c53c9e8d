"""PushParameters and PullParameters: uploads and downloads of the parameters that the server holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from optserve._common import wire
from optserve.v1 import replicas_pb2, steps_pb2
from optserve_server.domain.errors import OptserveError, Reason, renaming_fields
from optserve_server.edge import messages
from optserve_server.edge.gate.places import record_progress
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.parameter_copies import Copies
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import Outcome
from optserve_server.numerics.layout import Operand, Payload, Selection
from optserve_server.numerics.trial import check_reply

PushFrame = wire.Frame[replicas_pb2.PushParametersRequest]

decode_push = wire.decoder(replicas_pb2.PushParametersRequest)

_FIELDS = {"tensor": "chunk.tensor", "offset": "chunk.offset"}


def push(optimizers: Optimizers, frames: Iterator[PushFrame]) -> Outcome:
    """Upload the parameters in the frames. Without a commit nothing changes.

    Raises:
        OptserveError: See `Steps.begin_placement`, `Step.stage` and `Step.commit`. INVALID_FIELD if the stream ends
            without a commit.
    """
    first = next(frames, None)
    if first is None:
        raise OptserveError(Reason.INVALID_FIELD, "The first message of an upload must have `name`.", field="name")
    optimizer = optimizers.get(messages.optimizer_id(first.header.name))
    step = optimizer.steps.begin_placement(
        first.header.request_id, messages.wire_dtype(first.header.wire_type, "wire_type")
    )
    try:
        for frame in chain((first,), frames):
            header = frame.header
            if header.HasField("chunk"):
                if header.chunk.operand != steps_pb2.OPERAND_UNSPECIFIED:
                    raise OptserveError(
                        Reason.INVALID_FIELD, "A chunk of an upload must not have an operand.", field="chunk.operand"
                    )
                data = frame.data or b""
                with renaming_fields(_FIELDS):
                    step.stage(header.chunk.tensor, header.chunk.offset, data, Operand.PARAMETER)
                record_progress(len(data))
            elif header.data:
                raise OptserveError(Reason.INVALID_FIELD, "`data` came without `chunk`.", field="chunk")
            if header.HasField("commit"):
                return step.commit()
    finally:
        step.close()
    raise OptserveError(
        Reason.INVALID_FIELD, "The upload ended without `commit`, so nothing was changed.", field="commit"
    )


def pull(
    optimizer: Optimizer, copies: Copies, request: replicas_pb2.PullParametersRequest, max_chunk_bytes: int
) -> Iterator[bytes]:
    """The messages with the parameters of this moment, all of one step; steps go on meanwhile."""
    wire_dtype = messages.wire_dtype(request.wire_type, "wire_type")
    messages.check_tensor_count(request.tensors, optimizer.layout, "tensors")
    messages.check_life(request.life, "life")
    payload: Payload = optimizer.steps.payload(Selection(tuple(request.tensors)), wire_dtype)
    newer_than = request.newer_than_step if request.HasField("newer_than_step") else None
    step, copy = copies.of(optimizer, newer_than)
    if copy is not None:
        check_reply(optimizer.state, payload, copy.arenas)
    if request.worker:
        optimizer.steps.workers.pulled(request.worker, step, request.life)
    yield wire.encode(replicas_pb2.PullParametersResponse(step=step, not_modified=copy is None))
    if copy is None:
        return
    for run in payload.runs:
        stride = max_chunk_bytes // run.wire.itemsize * run.wire.itemsize
        for begin in range(run.begin, run.end, stride):
            header = replicas_pb2.PullParametersResponse()
            header.chunk.tensor, header.chunk.offset = payload.locate(begin)
            header.chunk.SetInParent()
            elements = optimizer.steps.main.staging.to_wire(copy.arenas, run, begin, min(begin + stride, run.end))
            yield wire.encode(header, elements.data.cast("B"))
