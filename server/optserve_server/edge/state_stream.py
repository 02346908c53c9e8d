"""ExportState and ImportState: turns state files into messages, and messages into a state."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from optserve._common import wire
from optserve.v1 import checkpoints_pb2
from optserve_server.domain.errors import OptserveError, Reason, renaming_fields
from optserve_server.edge import messages, settings_messages
from optserve_server.edge.gate.places import record_progress
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import check_request_id
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.parameter_steps import each
from optserve_server.numerics.settings import PARAMETER, Settings
from optserve_server.persistence.checkpoints import Checkpoints, import_target
from optserve_server.persistence.state_import import StateImport

ImportFrame = wire.Frame[checkpoints_pb2.ImportStateRequest]

decode_import = wire.decoder(checkpoints_pb2.ImportStateRequest)

_FIELDS = {name: f"chunk.{name}" for name in ("tensor", "slot", "parameter", "offset")}


def export_messages(checkpoints: Checkpoints, optimizer: Optimizer, max_chunk_bytes: int) -> Iterator[bytes]:
    """The messages with the state of this moment: first the optimizer, then its slots, tensor by tensor."""
    with checkpoints.exported(optimizer) as file:
        message, layout = messages.optimizer(optimizer, with_parameters=False), file.description.layout
        # Steps may have been applied since the export, and parameters added.
        message.MergeFromString(messages.serialized_parameters.of(layout))
        message.step = file.description.step
        for field in ("schedule", "clipping", "groups", "weight_decay", "weight_decay_factor", "consistency"):
            message.ClearField(field)
        settings_messages.set_settings(message, file.description.settings, layout)
        written = file.description.parameter_steps
        counted = () if written is None else each(written, len(layout.parameters))
        yield wire.encode(checkpoints_pb2.ExportStateResponse(optimizer=message, parameter_steps=counted))
        with file.mapped() as mapped:
            arenas = {(dtype, slot): array for dtype, slot, array in mapped}
        for tensor, parameter in enumerate(layout.parameters):
            if not parameter.size:
                # The file does not contain an arena whose tensors are all empty.
                continue
            start = layout.starts[tensor]
            stride = max_chunk_bytes // parameter.dtype.itemsize
            for slot, name in enumerate(optimizer.settings.arrays):
                values = arenas[parameter.dtype, slot][start : start + parameter.size]
                for begin in range(0, parameter.size, stride):
                    header = checkpoints_pb2.ExportStateResponse()
                    header.chunk.tensor = tensor
                    if name == PARAMETER:
                        header.chunk.parameter = True
                    else:
                        header.chunk.slot = slot
                    header.chunk.offset = begin * parameter.dtype.itemsize
                    yield wire.encode(header, values[begin : begin + stride].data.cast("B"))


def import_state(optimizers: Optimizers, checkpoints: Checkpoints, frames: Iterator[ImportFrame]) -> Optimizer:
    """Replace the state of an optimizer by the state in the frames. Without a commit nothing changes.

    Raises:
        OptserveError: See StateImport. INVALID_FIELD if the stream ends without a commit.
    """
    first = next(frames, None)
    if first is None:
        raise OptserveError(Reason.INVALID_FIELD, "The first message of an import must have `name`.", field="name")
    start = first.header
    if start.request_id:
        check_request_id(start.request_id)
    optimizer = optimizers.get(messages.optimizer_id(start.name))
    if not optimizer.was_replaced_by(start.request_id, import_target(start.step)):
        # The commit checks the etag once more. The check here spares a client with an old etag the transfer.
        optimizer.check_etag(start.etag)
    paths = list(start.update_mask.paths)

    def change(present: Settings, layout: Layout) -> Settings:
        if not (paths or start.HasField("optimizer")):
            return present
        return settings_messages.updated_settings(present, layout, start.optimizer, paths)

    # The commit makes these settings once more. The check here spares a client with impossible ones the transfer.
    change(optimizer.settings, optimizer.layout).check()
    with checkpoints.staging(optimizer) as staged:
        state = StateImport(checkpoints, optimizer, staged, change)
        parameter_steps = list(start.parameter_steps)
        state.check_parameter_steps(parameter_steps)
        for frame in chain((first,), frames):
            header = frame.header
            if header.HasField("chunk"):
                data = frame.data or b""
                with renaming_fields(_FIELDS):
                    state.stage(header.chunk.tensor, _array(optimizer, header.chunk), header.chunk.offset, data)
                record_progress(len(data))
            elif header.data:
                raise OptserveError(Reason.INVALID_FIELD, "`data` came without `chunk`.", field="chunk")
            if header.HasField("commit"):
                state.commit(start.step, start.etag, start.request_id, parameter_steps)
                return optimizer
    raise OptserveError(
        Reason.INVALID_FIELD, "The import ended without `commit`, so nothing was changed.", field="commit"
    )


def _array(optimizer: Optimizer, chunk: checkpoints_pb2.SlotChunk) -> int:
    """The position of a chunk's array among the arrays of the state; raises NOT_HOSTED or INVALID_FIELD."""
    if chunk.WhichOneof("array") != "parameter":
        if chunk.slot < len(optimizer.rule.slots):
            return chunk.slot
        slots = ", ".join(optimizer.rule.slots) or "none"
        raise OptserveError(
            Reason.INVALID_FIELD, f"There is no slot {chunk.slot}; {optimizer.rule.name} has {slots}.", field="slot"
        )
    if not chunk.parameter:
        raise OptserveError(Reason.INVALID_FIELD, "`parameter` must be true if it is given.", field="parameter")
    if not optimizer.settings.hosted:
        raise OptserveError(
            Reason.NOT_HOSTED, f"{optimizer.id!r} is in delta mode and holds no parameters.", field="parameter"
        )
    return len(optimizer.rule.slots)
