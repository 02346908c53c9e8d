"""A step in one message and its reply in another, for small models and for clients that do not stream."""

from __future__ import annotations

from optserve._common import wire
from optserve.v1 import steps_pb2
from optserve_server.domain.errors import OptserveError, Reason, renaming_fields
from optserve_server.edge import messages
from optserve_server.edge.gate.drain_gate import DrainGate
from optserve_server.edge.results import set_result
from optserve_server.edge.settings_messages import step_options
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.transaction import Reply, Step, StepRequest
from optserve_server.numerics.layout import Operand, Selection

RESULT_BYTES = 256
"""Most bytes that a unary reply takes beside its tensors and the learning rates of groups."""
_RATE_BYTES = 8


def apply(
    item: Optimizer, request: steps_pb2.ApplyGradientsRequest, drain_gate: DrainGate, max_reply_bytes: int
) -> steps_pb2.ApplyGradientsResponse:
    """Make a step.

    Args:
        item: The optimizer that the request names.
        request: The step.
        drain_gate: Admits the step.
        max_reply_bytes: Largest reply, in bytes.

    Raises:
        OptserveError: See `Steps.begin`, `Step.stage` and `Step.commit`. MESSAGE_TOO_LARGE for the reply.
    """
    asked = _asked(item, request)
    if asked.reply is not Reply.NOTHING:
        # Checked before the step is applied, because a step cannot be undone.
        _check_reply_bytes(item, asked.selection.listed, max_reply_bytes)
    with drain_gate.step():
        with renaming_fields({"tensors": "gradients"}):
            step = item.steps.begin(asked)
        try:
            for position, gradient in enumerate(request.gradients):
                path = f"gradients[{position}]"
                with renaming_fields({"data": f"{path}.data"}):
                    _stage(step, item, asked.selection.listed[position], gradient, path)
            outcome = step.commit()
            wanted = step.payload.tensors if asked.reply is not Reply.NOTHING else ()
            updates = [_reply(step, item, index) for index in wanted]
        finally:
            step.close()
    response = steps_pb2.ApplyGradientsResponse(updates=updates)
    set_result(response.result, outcome)
    return response


def _asked(item: Optimizer, request: steps_pb2.ApplyGradientsRequest) -> StepRequest:
    """The request of the engine that a message stands for."""
    reply = messages.reply(request.reply, "reply")
    messages.check_life(request.life, "life")
    if item.settings.consistency is not None and item.settings.consistency.waits:
        # This step would wait for other steps, and keep a thread that those may need.
        raise OptserveError(
            Reason.INVALID_FIELD,
            "A worker's step may have to wait for other workers, so it needs a stream; use StreamSteps.",
            field="worker",
        )
    tensors = tuple(_tensor_index(item, tensor.name, i) for i, tensor in enumerate(request.gradients))
    if not tensors:
        raise OptserveError(Reason.INVALID_FIELD, "A step needs at least one gradient.", field="gradients")
    return StepRequest(
        request.request_id,
        request.expected_step if request.HasField("expected_step") else None,
        Selection(tensors),
        lineage=request.lineage,
        reply=reply,
        worker=request.worker,
        parameters_step=request.parameters_step if request.HasField("parameters_step") else None,
        life=request.life,
        last_request_id=request.last_request_id if request.HasField("last_request_id") else None,
        options=step_options(request, item),
    )


def _check_reply_bytes(item: Optimizer, tensors: tuple[int, ...], limit: int) -> None:
    size = RESULT_BYTES + _RATE_BYTES * len(item.settings.groups) + sum(_reply_bytes(item, index) for index in tensors)
    if size > limit:
        raise OptserveError(
            Reason.MESSAGE_TOO_LARGE,
            f"The reply would have {size} bytes; at most {limit} are allowed. Use StreamSteps for larger models.",
            field="gradients",
            limit_bytes=limit,
            actual_bytes=size,
        )


def _tensor_index(item: Optimizer, name: str, position: int) -> int:
    index = item.layout.indices.get(name)
    if index is None:
        raise OptserveError(
            Reason.UNKNOWN_PARAMETER,
            f"{item.id!r} has no parameter {name[:100]!r}.",
            field=f"gradients[{position}].name",
            parameter=name,
        )
    return index


def _stage(step: Step, item: Optimizer, index: int, gradient: steps_pb2.Tensor, path: str) -> None:
    """Check one gradient of a unary step against its parameter and stage it."""
    parameter = item.layout.parameters[index]
    if gradient.shape and tuple(gradient.shape) != parameter.shape:
        raise OptserveError(
            Reason.WRONG_SHAPE,
            f"{parameter.name!r} has shape {list(parameter.shape)}, not {list(gradient.shape)[:16]}.",
            field=f"{path}.shape",
            parameter=parameter.name,
            expected=list(parameter.shape),
            actual=list(gradient.shape)[:16],
        )
    dtype = messages.wire_dtype(gradient.data_type, f"{path}.data_type")
    # Not `dtype in (None, …)`: to NumPy, None is another name of float64.
    if dtype is not None and dtype != parameter.dtype:
        raise OptserveError(
            Reason.WRONG_DATA_TYPE,
            f"{parameter.name!r} is {parameter.dtype.name}; a unary step takes gradients in the same data type.",
            field=f"{path}.data_type",
            parameter=parameter.name,
        )
    size = parameter.size * parameter.dtype.itemsize
    curvature_size = size if item.rule.takes_curvature else 0
    for name, data, expected, operand in (
        ("data", gradient.data, size, Operand.GRADIENT),
        ("curvature", gradient.curvature, curvature_size, Operand.CURVATURE),
    ):
        if len(data) != expected:
            raise OptserveError(
                Reason.WRONG_BYTE_COUNT,
                f"{item.rule.name} needs {expected} bytes of {parameter.dtype.name} in the {operand.value} of "
                f"{parameter.name!r}, not {len(data)}.",
                field=f"{path}.{name}",
                parameter=parameter.name,
                expected=expected,
                actual=len(data),
            )
        if expected:
            step.stage(index, 0, data, operand)


def _reply_bytes(item: Optimizer, index: int) -> int:
    """A bound on what one tensor adds to a unary reply."""
    parameter = item.layout.parameters[index]
    framing = 32 + len(parameter.name.encode()) + 10 * len(parameter.shape)
    return framing + parameter.size * parameter.dtype.itemsize


def _reply(step: Step, item: Optimizer, index: int) -> steps_pb2.Tensor:
    parameter = item.layout.parameters[index]
    return steps_pb2.Tensor(
        name=parameter.name,
        shape=parameter.shape,
        data_type=wire.DATA_TYPES[parameter.dtype],  # pyright: ignore[reportArgumentType]
        data=step.whole(index),
    )
