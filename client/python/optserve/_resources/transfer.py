"""Transfers of states and parameters, in both directions."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeVar

import grpc
import numpy as np

from optserve import _reasons
from optserve._common import wire
from optserve._common.wire import DTYPES
from optserve._resources import replies
from optserve._resources.features import has_feature
from optserve._resources.parameter_table import empty
from optserve._rpc.connection import Connection
from optserve._rpc.retry import Backoff, is_retryable
from optserve._steps.updates import Updates
from optserve._values.settings_messages import (
    Changes,
    clipping_from,
    consistency_from,
    differences,
    groups_from,
    schedule_from,
    update_request,
    weight_decay_from,
)
from optserve.errors import FeatureUnavailableError, InvalidArgumentError
from optserve.state import MAX_STEP, PARAMETER, OptimizerState, Progress, TensorSpec, steps_in_order
from optserve.v1 import checkpoints_pb2, optimizer_pb2, replicas_pb2, service_pb2, steps_pb2

CHUNK_BYTES = 1 << 20

_Result = TypeVar("_Result")


def export_state(connection: Connection, name: str, on_progress: Progress) -> OptimizerState:
    """Read the state of the optimizer with that resource name.

    Raises:
        OptserveError: The server has refused the call, or has not answered in time.
    """
    request = checkpoints_pb2.ExportStateRequest(name=name)

    def attempt(timeout_s: float) -> OptimizerState:
        with closing(connection.export_state(request, timeout_s)) as frames:
            return _read_state(frames, name, on_progress)

    return with_retries(connection, attempt)


def import_state(
    connection: Connection, optimizer: optimizer_pb2.Optimizer, state: OptimizerState, on_progress: Progress
) -> optimizer_pb2.Optimizer:
    """Replace the state of an optimizer, and the settings that the state has.

    Raises:
        InvalidArgumentError: The state is of another method or of other parameters. Nothing was changed.
        FeatureUnavailableError: The state has other settings than the optimizer, and the server cannot import settings.
        OptserveError: The server has refused the call, or has not answered in time.
    """
    names, arrays = _array_names(optimizer), _arrays(optimizer, state)
    # One id for all tries: a retry after a lost answer must not undo the steps since.
    first = checkpoints_pb2.ImportStateRequest(name=optimizer.name, step=state.step, request_id=str(uuid.uuid4()))
    if state.parameter_steps is not None:
        first.parameter_steps.extend(
            steps_in_order(state.parameter_steps, [item.name for item in optimizer.parameters])
        )
    said = state.settings
    # A state without a consistency leaves the consistency of the optimizer as it is.
    consistency = said.get("consistency") or ...
    new_settings = Changes(
        said.get("schedule", ...),
        said.get("clipping", ...),
        said.get("groups", ...),
        said.get("weight_decay"),
        consistency,
    )
    changes = update_request(
        optimizer.name, state.algorithm.name, state.algorithm, new_settings, decay_kind=optimizer.weight_decay_kind
    )
    if has_feature(connection, service_pb2.FEATURE_IMPORTED_SETTINGS):
        first.optimizer.CopyFrom(changes.optimizer)
        first.update_mask.CopyFrom(changes.update_mask)
    elif others := differences(optimizer, algorithm=state.algorithm, **{**said, "consistency": consistency}):
        raise FeatureUnavailableError(
            f"This server cannot import settings, and {others[0]}. Update the optimizer's settings first, or import "
            "state.without(…), which leaves settings out."
        )
    answer = with_retries(
        connection,
        lambda timeout_s: connection.import_state(
            _messages(first, names, arrays, on_progress, state.size_bytes), timeout_s
        ),
    )
    return replies.optimizer(answer.optimizer, optimizer.name)


def push_parameters(connection: Connection, name: str, arrays: Sequence[np.ndarray]) -> int:
    """Upload all parameters of an optimizer, in the order of their indices. Returns the step of the optimizer.

    Raises:
        OptserveError: The server has refused the call, or has not answered in time.
    """
    first = replicas_pb2.PushParametersRequest(name=name, request_id=str(uuid.uuid4()))

    def messages() -> Iterator[bytes]:
        yield wire.encode(first)
        for tensor, array in enumerate(arrays):
            data = array.reshape(-1).view(np.uint8).data
            for offset in range(0, len(data), CHUNK_BYTES):
                header = replicas_pb2.PushParametersRequest()
                header.chunk.tensor, header.chunk.offset = tensor, offset
                yield wire.encode(header, data[offset : offset + CHUNK_BYTES])
        yield wire.encode(replicas_pb2.PushParametersRequest(commit=steps_pb2.Commit()))

    return with_retries(connection, lambda timeout_s: connection.push_parameters(messages(), timeout_s)).step


def pull_parameters(
    connection: Connection, request: replicas_pb2.PullParametersRequest, arrays: Updates, timeout_s: float | None
) -> tuple[int, bool]:
    """Read parameters into arrays: (their step, whether the parameters were newer).

    Without `timeout_s` it may take as long as a step.

    Raises:
        OptserveError: The server has refused the call, or has not answered in time.
    """

    def received(timeout_s: float) -> tuple[int, bool]:
        arrays.reset()
        with closing(connection.pull_parameters(request, timeout_s)) as frames:
            first = _first_header(frames)
            newer_than = request.newer_than_step if request.HasField("newer_than_step") else None
            if first.not_modified:
                if newer_than is None or first.step > newer_than or next(frames, None) is not None:
                    raise replies.invalid_reply(f"the parameters of step {first.step} are said not to be newer")
                return first.step, False
            if newer_than is not None and first.step <= newer_than:
                raise replies.invalid_reply(
                    f"the parameters are of step {first.step}, which is not newer than {newer_than}"
                )
            for frame in frames:
                if frame.data is None:
                    raise replies.invalid_reply("a message has no parameters")
                arrays.put(frame.header.chunk.tensor, frame.header.chunk.offset, frame.data)
                arrays.write_large()
            arrays.finish()
        return first.step, True

    return with_retries(connection, received, timeout_s)


def _first_header(frames: Iterator[wire.Frame[Any]]) -> Any:
    """The header of the first message, which has no payload; raises InternalError."""
    first = next(frames, None)
    if first is None or first.data is not None:
        raise replies.invalid_reply("it does not begin with a message without data, which describes what follows")
    return first.header


def with_retries(
    connection: Connection, attempt: Callable[[float], _Result], timeout_s: float | None = None
) -> _Result:
    """Call `attempt` with the seconds that are left, until it succeeds, the server refuses, or the time is up."""
    backoff = Backoff(connection.config, connection.clock)
    patience = connection.patience(timeout_s)
    while True:
        try:
            return attempt(max(patience.left_s, 0.001))
        except grpc.RpcError as error:
            failure = connection.translate(error, patience.timeout_s)
        # The server discards an upload without progress; a retry under the same id begins it anew.
        if not (is_retryable(failure) or failure.reason == _reasons.STEP_TAKEN_OVER):
            raise failure
        patience.pause(backoff.next_pause_s(failure), failure)


def _read_state(
    frames: Iterator[wire.Frame[checkpoints_pb2.ExportStateResponse]], name: str, on_progress: Progress
) -> OptimizerState:
    first = _first_header(frames)
    optimizer = replies.optimizer(first.optimizer, name)
    parameters = {
        item.name: TensorSpec(tuple(item.shape), DTYPES[item.data_type].name) for item in optimizer.parameters
    }
    slots = {
        name: {array: empty(spec.shape, np.dtype(spec.dtype)) for array in _array_names(optimizer)}
        for name, spec in parameters.items()
    }
    arrays = [array for of_one in slots.values() for array in of_one.values()]
    # `Updates` sees each array of each parameter as a separate tensor.
    received = Updates(range(len(arrays)), arrays)
    per_parameter = len(_array_names(optimizer))
    done, total = 0, sum(array.nbytes for array in arrays)
    on_progress(0, total)
    for frame in frames:
        chunk = frame.header.chunk
        array = len(optimizer.slots) if chunk.WhichOneof("array") == "parameter" else chunk.slot
        if frame.data is None or array >= per_parameter:
            raise replies.invalid_reply("a message has no state, or a part of an array that does not exist")
        received.put(chunk.tensor * per_parameter + array, chunk.offset, frame.data)
        received.write_large()
        done += len(frame.data)
        on_progress(done, total)
    received.finish()
    return OptimizerState(
        optimizer.step,
        replies.method(optimizer),
        parameters,
        slots,
        schedule=schedule_from(optimizer),
        clipping=clipping_from(optimizer),
        groups=groups_from(optimizer),
        weight_decay=weight_decay_from(optimizer),
        consistency=consistency_from(optimizer),
        parameter_steps=_parameter_steps(first.parameter_steps, list(parameters)),
    )


def _parameter_steps(counts: Sequence[int], names: Sequence[str]) -> dict[str, int] | None:
    """The step counter of each parameter; None if the server sent none. Raises InternalError."""
    if not counts:
        return None
    if len(counts) != len(names) or max(counts) > MAX_STEP:
        raise replies.invalid_reply(f"it has step counters of {len(counts)} parameters, up to {max(counts)}")
    return dict(zip(names, counts, strict=True))


def _array_names(optimizer: optimizer_pb2.Optimizer) -> list[str]:
    """Names of the arrays of a state: the slots, and the parameter itself in hosted mode."""
    return [*optimizer.slots, *([PARAMETER] if optimizer.mode == optimizer_pb2.MODE_HOSTED else [])]


def _messages(
    first: checkpoints_pb2.ImportStateRequest,
    names: Sequence[str],
    arrays: Sequence[Sequence[np.ndarray]],
    on_progress: Progress,
    total: int,
) -> Iterator[bytes]:
    yield wire.encode(first)
    done = 0
    on_progress(0, total)
    for tensor, slots in enumerate(arrays):
        for slot, array in enumerate(slots):
            data = array.reshape(-1).view(np.uint8).data
            for offset in range(0, len(data), CHUNK_BYTES):
                header = checkpoints_pb2.ImportStateRequest()
                header.chunk.tensor, header.chunk.offset = tensor, offset
                if names[slot] == PARAMETER:
                    header.chunk.parameter = True
                else:
                    header.chunk.slot = slot
                part = data[offset : offset + CHUNK_BYTES]
                yield wire.encode(header, part)
                done += len(part)
                on_progress(done, total)
    last = checkpoints_pb2.ImportStateRequest()
    last.commit.SetInParent()
    yield wire.encode(last)


def _arrays(optimizer: optimizer_pb2.Optimizer, state: OptimizerState) -> list[list[np.ndarray]]:
    """The state's arrays in the order of the optimizer's parameters, after a check that they fit."""
    method = optimizer.algorithm.WhichOneof("method")
    if state.algorithm.name != method:
        raise InvalidArgumentError(f"The state is of {state.algorithm.name}; the optimizer is of {method}.")
    own = [item.name for item in optimizer.parameters]
    for names, others, what in ((own, state.slots, "lacks"), (state.slots, set(own), "has another parameter,")):
        for name in names:
            if name not in others:
                raise InvalidArgumentError(f"The state {what} {name!r}.", metadata={"parameter": name})
    return [
        _slots_of(item.name, tuple(item.shape), DTYPES[item.data_type], _array_names(optimizer), state.slots[item.name])
        for item in optimizer.parameters
    ]


def _slots_of(
    name: str, shape: tuple[int, ...], dtype: np.dtype, slots: list[str], arrays: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    if set(arrays) != set(slots):
        raise InvalidArgumentError(
            f"The state of {name!r} has the slots {sorted(arrays)}; these are needed: {sorted(slots)}.",
            metadata={"parameter": name},
        )
    for slot, array in arrays.items():
        if array.shape != shape or array.dtype != dtype:
            raise InvalidArgumentError(
                f"{slot} of {name!r} is {list(array.shape)} {array.dtype}, not {list(shape)} {dtype}.",
                metadata={"parameter": name},
            )
    return [np.ascontiguousarray(arrays[slot]) for slot in slots]
