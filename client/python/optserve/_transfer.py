"""An optimizer's whole state over the wire, either way."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import grpc
import numpy as np

from optserve import wire
from optserve._stream import Updates
from optserve._transport import Backoff, Transport, is_retryable
from optserve.algorithms import from_message
from optserve.errors import InternalError, InvalidArgumentError
from optserve.state import PARAMETER, OptimizerState, Progress, TensorSpec
from optserve.v1 import checkpoints_pb2, optimizer_pb2, replicas_pb2, steps_pb2
from optserve.wire import DTYPES

CHUNK_BYTES = 1 << 20

_Result = TypeVar("_Result")


def export_state(connection: Transport, name: str, on_progress: Progress) -> OptimizerState:
    """Read the state of the optimizer with that resource name.

    Raises:
        OptserveError: The server's answer, or that it gave none.
    """
    request = checkpoints_pb2.ExportStateRequest(name=name)
    return _persistently(connection, lambda: _received(connection.export_state(request), on_progress))


def import_state(
    connection: Transport, optimizer: optimizer_pb2.Optimizer, state: OptimizerState, on_progress: Progress
) -> optimizer_pb2.Optimizer:
    """Replace the state of an optimizer.

    Raises:
        InvalidArgumentError: The state is of another method or of other parameters. Nothing was changed.
        OptserveError: The server's answer, or that it gave none.
    """
    names, arrays = _array_names(optimizer), _arrays(optimizer, state)
    # One id for all tries: a retry after a lost answer must not undo the steps since.
    first = checkpoints_pb2.ImportStateRequest(name=optimizer.name, step=state.step, request_id=str(uuid.uuid4()))
    return _persistently(
        connection,
        lambda: connection.import_state(_messages(first, names, arrays, on_progress, state.size_bytes)).optimizer,
    )


def push_parameters(connection: Transport, name: str, arrays: Sequence[np.ndarray]) -> int:
    """Upload all parameters of an optimizer, in the order of their indices; gives its step.

    Raises:
        OptserveError: The server's answer, or that it gave none.
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

    return _persistently(connection, lambda: connection.push_parameters(messages())).step


def pull_parameters(
    connection: Transport, request: replicas_pb2.PullParametersRequest, arrays: Updates
) -> tuple[int, bool]:
    """Read parameters into arrays: (their step, whether there was anything newer).

    Raises:
        OptserveError: The server's answer, or that it gave none.
    """

    def received() -> tuple[int, bool]:
        arrays.reset()
        frames = connection.pull_parameters(request)
        first = next(frames).header
        for frame in frames:
            arrays.put(frame.header.chunk, frame.data or b"")
        if not first.not_modified:
            arrays.check_complete()
        return first.step, not first.not_modified

    return _persistently(connection, received)


def _persistently(connection: Transport, attempt: Callable[[], _Result]) -> _Result:
    """Try until it succeeds, the server refuses, or patience ends."""
    backoff = Backoff(connection.config)
    patience = connection.patience(None)
    while True:
        try:
            return attempt()
        except grpc.RpcError as error:
            failure = connection.translate(error, connection.config.step_timeout_s)
        # What has not moved for long is discarded; under the same id it is the same upload.
        if not (is_retryable(failure) or failure.reason == "STEP_TAKEN_OVER"):
            raise failure
        patience.pause(backoff.next_s(failure), failure)


def _received(
    frames: Iterator[wire.Frame[checkpoints_pb2.ExportStateResponse]], on_progress: Progress
) -> OptimizerState:
    optimizer = next(frames).header.optimizer
    parameters = {
        item.name: TensorSpec(tuple(item.shape), DTYPES[item.data_type].name) for item in optimizer.parameters
    }
    slots = {
        name: {array: np.zeros(spec.shape, spec.dtype) for array in _array_names(optimizer)}
        for name, spec in parameters.items()
    }
    views = [[array.reshape(-1).view(np.uint8) for array in arrays.values()] for arrays in slots.values()]
    total = sum(view.size for arrays in views for view in arrays)
    done = 0
    on_progress(0, total)
    for frame in frames:
        chunk, data = frame.header.chunk, frame.data or b""
        array = -1 if chunk.WhichOneof("array") == "parameter" else chunk.slot
        views[chunk.tensor][array][chunk.offset : chunk.offset + len(data)] = np.frombuffer(data, np.uint8)
        done += len(data)
        on_progress(done, total)
    if done != total:
        raise InternalError(f"The server sent {done} bytes of state instead of {total}.")
    return OptimizerState(optimizer.step, from_message(optimizer.algorithm), parameters, slots)


def _array_names(optimizer: optimizer_pb2.Optimizer) -> list[str]:
    """The arrays of a state: the slots, and the parameter itself where the server holds it."""
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
    """The state's arrays in the optimizer's order, checked against it."""
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
