"""AddParameters: turns messages into parameters that a live optimizer gets, with their values in hosted mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from optserve._common import wire
from optserve.v1 import additions_pb2, steps_pb2
from optserve_server.domain import refusals
from optserve_server.domain.errors import OptserveError, Reason, renaming_fields
from optserve_server.edge import messages, settings_messages
from optserve_server.edge.gate.places import record_progress
from optserve_server.engine.addition import NewParameters, addition
from optserve_server.engine.change_queue import WAIT_S
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import Step
from optserve_server.numerics.layout import Layout, Operand
from optserve_server.numerics.settings import Settings

AddFrame = wire.Frame[additions_pb2.AddParametersRequest]

decode_add = wire.decoder(additions_pb2.AddParametersRequest)

_FIELDS = {
    "tensor": "chunk.tensor",
    "offset": "chunk.offset",
    "optimizer.parameters": "parameters",
    "optimizer.groups": "groups",
}


def add_parameters(
    optimizers: Optimizers,
    frames: Iterator[AddFrame],
    max_message_bytes: int,
    time_left_s: Callable[[], float | None],
) -> Optimizer:
    """Add the parameters in the frames, and return their optimizer. Without a commit nothing changes.

    Args:
        optimizers: The optimizers of the server.
        frames: The messages of the call.
        max_message_bytes: Largest message that shows an optimizer.
        time_left_s: The time until the deadline of the call; None if it has none.

    Raises:
        OptserveError: See `addition`, `Step.stage` and `Step.commit`. INVALID_FIELD if there is no commit.
    """
    first = next(frames, None)
    if first is None:
        raise OptserveError(Reason.INVALID_FIELD, "The first message of an addition must have `name`.", field="name")
    start = first.header
    optimizer = optimizers.get(messages.optimizer_id(start.name))

    def check(layout: Layout, settings: Settings) -> None:
        messages.check_showable(layout, settings, max_message_bytes)

    def wait_s() -> float:
        left_s = time_left_s()
        # The other half is for the work, and for the error if there is one.
        return WAIT_S if left_s is None else min(WAIT_S, left_s / 2)

    with renaming_fields(_FIELDS):
        optimizers.capacity.check_count(len(start.parameters))
        wire_dtype = messages.wire_dtype(start.wire_type, "wire_type")
        with addition(optimizers, optimizer, _new_parameters(optimizer, start), check, wire_dtype, wait_s) as step:
            for frame in chain((first,), frames):
                _stage(step, frame, optimizer)
                if frame.header.HasField("commit"):
                    step.commit()
                    return optimizer
    raise OptserveError(
        Reason.INVALID_FIELD, "The addition ended without `commit`, so nothing was changed.", field="commit"
    )


def _new_parameters(optimizer: Optimizer, start: additions_pb2.AddParametersRequest) -> NewParameters:
    """What the first message asks for, or raise INVALID_FIELD, DUPLICATE_PARAMETER, UNKNOWN_PARAMETER or such."""
    layout = messages.layout(start.parameters, "parameters")
    present = optimizer.layout.indices
    for position, group in enumerate(start.groups):
        for name in group.parameters:
            if name in present and name not in layout.indices:
                raise OptserveError(
                    Reason.UNKNOWN_PARAMETER,
                    f"{name!r} is not new; groups of parameters that exist are changed by UpdateOptimizer.",
                    field=f"groups[{position}].parameters",
                    parameter=name,
                )
    kind = optimizer.settings.decay_kind
    groups = settings_messages.groups(start.groups, optimizer.rule, kind, layout, "groups")
    return NewParameters(layout, groups, start.request_id, start.etag, start.lineage, kind)


def _stage(step: Step, frame: AddFrame, optimizer: Optimizer) -> None:
    """Take the chunk of a message, if it has one."""
    header = frame.header
    if not header.HasField("chunk"):
        if header.data:
            raise OptserveError(Reason.INVALID_FIELD, "`data` came without `chunk`.", field="chunk")
        return
    if not optimizer.settings.hosted:
        raise refusals.not_hosted(optimizer.id, "chunk")
    if header.chunk.operand != steps_pb2.OPERAND_UNSPECIFIED:
        raise OptserveError(
            Reason.INVALID_FIELD, "A chunk of an addition must not have an operand.", field="chunk.operand"
        )
    data = frame.data or b""
    step.stage(header.chunk.tensor, header.chunk.offset, data, Operand.PARAMETER)
    record_progress(len(data))
