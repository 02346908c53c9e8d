"""What users call: `connect`, `Client` and `Optimizer`."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from optserve import algorithms
from optserve._stream import Gradients, StepStream, Updates
from optserve._transport import Backoff, Transport
from optserve.config import ClientConfig
from optserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    OptserveError,
    StepInDoubtError,
    StepInProgressError,
    UnavailableError,
    WrongStepError,
)
from optserve.v1 import checkpoints_pb2, optimizer_pb2, service_pb2, steps_pb2
from optserve.wire import DATA_TYPES, DTYPES

WireDtype = Literal["native", "float32", "float64", "float16", "bfloat16"]
TransportName = Literal["auto", "grpc", "shm"]


class ArrayLike(Protocol):
    """Anything with a shape and a NumPy dtype; arrays above all."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a parameter, where there is no array at hand.

    Args:
        shape: Extents; empty for a scalar.
        dtype: float32 or float64, as NumPy understands it.
    """

    shape: tuple[int, ...]
    dtype: Any = "float32"


def connect(target: str = "127.0.0.1:50051", config: ClientConfig | None = None) -> Client:
    """Connect to a server.

    Args:
        target: HOST:PORT, or `unix:PATH`.
        config: Deadlines, retries and sizes.

    Returns:
        A client, to be used in a with-block or closed.

    Raises:
        UnavailableError: No server answered within `config.connect_timeout_s`.

    Example:
        >>> with optserve.connect("127.0.0.1:50051") as client:  # doctest: +SKIP
        ...     opt = client.create_optimizer("mlp", optserve.Adadelta(), {"w": w})
        ...     w += opt.step({"w": gradient})["w"]
    """
    return Client(target, config or ClientConfig())


class Client:
    """A connection to one server. Safe to use from several threads; not in a forked process."""

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._transport = Transport(target, config)
        try:
            self.server_info(timeout_s=config.connect_timeout_s)
        except BaseException:
            self._transport.close()
            raise

    @property
    def target(self) -> str:
        """What this client is connected to."""
        return self._transport.target

    def server_info(self, *, timeout_s: float | None = None) -> service_pb2.GetServerInfoResponse:
        """What the server is, can do and accepts."""
        request = service_pb2.GetServerInfoRequest()
        return self._transport.call(self._transport.stub.GetServerInfo, request, timeout_s=timeout_s)

    def create_optimizer(
        self, name: str, algorithm: algorithms.Algorithm, params: Mapping[str, ArrayLike | TensorSpec]
    ) -> Optimizer:
        """Make an optimizer with all state at 0.

        Args:
            name: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit.
            algorithm: The method.
            params: The model's parameters by name: arrays, or anything else with a shape and a NumPy dtype.

        Raises:
            AlreadyExistsError: The name is taken.
            InvalidArgumentError: A name, shape, dtype or hyper-parameter that cannot be used.
            ResourceExhaustedError: The model is too large for the server.
        """
        message = optimizer_pb2.Optimizer(algorithm=algorithm.to_message())
        for parameter, spec in params.items():
            message.parameters.add(name=parameter, shape=spec.shape, data_type=_data_type(parameter, spec.dtype))
        request = service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message, request_id=str(uuid.uuid4()))
        return Optimizer(self._transport, self._transport.call(self._transport.stub.CreateOptimizer, request).optimizer)

    def optimizer(self, name: str, *, transport: TransportName = "auto", wire_dtype: WireDtype = "native") -> Optimizer:
        """Find an existing optimizer.

        Args:
            name: As given to `create_optimizer`.
            transport: `grpc` sends tensors over the network, `shm` through memory shared with a server on the same
                host; `auto` takes the fastest that works.
            wire_dtype: Element type of gradients and updates on the way; `native` is each parameter's own.

        Raises:
            NotFoundError: There is none of that name.
        """
        request = service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")
        found = self._transport.call(self._transport.stub.GetOptimizer, request).optimizer
        return Optimizer(self._transport, found, transport=transport, wire_dtype=wire_dtype)

    def list_optimizers(self) -> Iterator[optimizer_pb2.Optimizer]:
        """All optimizers of the server, by name, without their parameters."""
        token = ""
        while True:
            request = service_pb2.ListOptimizersRequest(page_token=token)
            page = self._transport.call(self._transport.stub.ListOptimizers, request)
            yield from page.optimizers
            token = page.next_page_token
            if not token:
                return

    def delete_optimizer(self, name: str, *, missing_ok: bool = False) -> None:
        """Delete an optimizer and its state.

        Raises:
            NotFoundError: There is none of that name, unless `missing_ok`.
            StepInProgressError: A step on it is under way.
        """
        # A retry after a lost answer finds nothing, so whether it was there is asked for beforehand.
        if not missing_ok:
            self.optimizer(name)
        request = service_pb2.DeleteOptimizerRequest(name=f"optimizers/{name}", allow_missing=True)
        self._transport.call(self._transport.stub.DeleteOptimizer, request)

    def close(self) -> None:
        """Close the connection. Steps under way on the server are discarded; its state stays."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Optimizer:
    """An optimizer on the server. Its steps come one after the other, also from several threads.

    Attributes:
        name: As given to `create_optimizer`.
        current_step: Steps that the server has applied, as far as this object knows.
    """

    def __init__(
        self,
        connection: Transport,
        message: optimizer_pb2.Optimizer,
        *,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
    ) -> None:
        self._connection = connection
        self._open_request = steps_pb2.Open(
            name=message.name,
            wire_type=_wire_type(wire_dtype),  # pyright: ignore[reportArgumentType]
            transport=steps_pb2.TRANSPORT_SHARED_MEMORY if transport == "shm" else steps_pb2.TRANSPORT_STREAM,
        )
        self._lock = threading.Lock()
        self._stream: StepStream | None = None
        self._in_doubt = ""
        self._parameters = list(message.parameters)
        self._indices = {parameter.name: index for index, parameter in enumerate(self._parameters)}
        self.name = message.name.removeprefix("optimizers/")
        self.current_step = message.step

    def step(
        self,
        grads: Mapping[str, np.ndarray],
        *,
        out: Mapping[str, np.ndarray] | None = None,
        partial: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Send the gradients of one step, get its updates.

        The step is applied exactly once: if the connection is lost on the way, it is made again and the step is
        resumed under the same request id.

        Args:
            grads: The gradient of every parameter, in the parameter's shape and dtype.
            out: Arrays that take the updates; new ones are made by default.
            partial: Allow parameters to be absent; they and their state stay as they are.
            timeout_s: Longest time to wait, `ClientConfig.step_timeout_s` by default.

        Returns:
            The updates Δx by name, to be added to the parameters.

        Raises:
            InvalidArgumentError: A name, shape, dtype or value that cannot be used; nothing was changed.
            WrongStepError: Somebody else has stepped this optimizer; nothing was changed. See `refresh`.
            StepInDoubtError: An earlier step that was interrupted had been applied. See `replay`.
            UnavailableError, DeadlineExceededError: No answer; the next call finds out what became of the step.
        """
        indices = self._taking_part(grads, partial=partial)
        names = [self._parameters[index].name for index in indices]
        arrays = [
            np.ascontiguousarray(self._checked(index, np.asarray(grads[name]), "gradient"))
            for index, name in zip(indices, names, strict=True)
        ]
        gradients = Gradients(indices, arrays, whole=len(indices) == len(self._parameters))
        updates = self._arrays(indices, out)
        with self._lock:
            self._run(gradients, Updates(indices, updates), timeout_s)
        return dict(zip(names, updates, strict=True))

    def replay(self, *, timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """The updates of the last applied step once more, the same bytes.

        For a step whose call was interrupted after the server had applied it.

        Raises:
            FailedPreconditionError: There is no such step, or its reply is no longer retained.
        """
        with self._lock:
            deadline = self._deadline(timeout_s)
            self._in_doubt = ""
            # What the server says when a stream is opened is true of that moment only.
            self._close_stream()
            opened = self._opened(deadline).opened
            if not opened.last_request_id:
                raise FailedPreconditionError(f"{self.name!r} has not been stepped, so there is nothing to replay.")
            indices = list(opened.last_tensors) or list(range(len(self._parameters)))
            updates = self._arrays(indices, None)
            self._exchange(opened.last_request_id, Gradients([], [], whole=True), Updates(indices, updates), deadline)
            return {self._parameters[index].name: update for index, update in zip(indices, updates, strict=True)}

    def refresh(self) -> None:
        """Read the current step from the server, giving up what this object believed."""
        self.current_step = self._get().step
        self._in_doubt = ""

    def update(self, algorithm: algorithms.Algorithm) -> None:
        """Change hyper-parameters from the next step on; the state stays.

        Raises:
            InvalidArgumentError: Another method, or a value out of range.
        """
        request = service_pb2.UpdateOptimizerRequest(
            optimizer=optimizer_pb2.Optimizer(name=self._open_request.name, algorithm=algorithm.to_message())
        )
        request.update_mask.paths.append("algorithm")
        self._connection.call(self._connection.stub.UpdateOptimizer, request)

    @property
    def algorithm(self) -> algorithms.Algorithm:
        """The method with its present hyper-parameters, as the server has them."""
        return algorithms.from_message(self._get().algorithm)

    def save_checkpoint(self, tag: str, *, overwrite: bool = False) -> checkpoints_pb2.Checkpoint:
        """Take a named copy of the state.

        Raises:
            AlreadyExistsError: The tag is taken, unless `overwrite`.
            FeatureUnavailableError: The server has no checkpoints.
        """
        request = checkpoints_pb2.SaveCheckpointRequest(
            parent=self._open_request.name, tag=tag, overwrite=overwrite, request_id=str(uuid.uuid4())
        )
        return self._connection.call(self._connection.stub.SaveCheckpoint, request).checkpoint

    def restore_checkpoint(self, tag: str) -> None:
        """Roll the state and the step counter back to a named copy.

        Raises:
            NotFoundError: There is no such tag.
            FeatureUnavailableError: The server has no checkpoints.
        """
        request = checkpoints_pb2.RestoreCheckpointRequest(
            name=f"{self._open_request.name}/checkpoints/{tag}", request_id=str(uuid.uuid4())
        )
        self.current_step = self._connection.call(self._connection.stub.RestoreCheckpoint, request).optimizer.step

    def cancel(self) -> None:
        """Interrupt the step that another thread is in the middle of; it raises there."""
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def close(self) -> None:
        """Close this object's stream; the optimizer itself stays on the server."""
        with self._lock:
            self._close_stream()

    def _get(self) -> optimizer_pb2.Optimizer:
        request = service_pb2.GetOptimizerRequest(name=self._open_request.name)
        return self._connection.call(self._connection.stub.GetOptimizer, request).optimizer

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (timeout_s or self._connection.config.step_timeout_s)

    def _run(self, gradients: Gradients, updates: Updates, timeout_s: float | None) -> None:
        """Make one new step, under the lock."""
        deadline = self._deadline(timeout_s)
        doubt = self._in_doubt
        if doubt:
            self._raise_if_applied(doubt, deadline)
        request_id = str(uuid.uuid4())
        self._in_doubt = request_id
        try:
            self._exchange(request_id, gradients, updates, deadline)
        except WrongStepError:
            # The server may have come to commit the interrupted step only after it was asked about it.
            if doubt:
                self._in_doubt = doubt
                self._raise_if_applied(doubt, deadline)
            self._in_doubt = ""
            raise
        except OptserveError as error:
            # The server has spoken about this very step: it was not applied.
            if error.reason:
                self._in_doubt = ""
            raise
        self._in_doubt = ""

    def _raise_if_applied(self, request_id: str, deadline: float) -> None:
        """Raise StepInDoubtError if a step whose call was interrupted is the last that was applied."""
        self._close_stream()
        if self._opened(deadline).opened.last_request_id == request_id:
            raise StepInDoubtError(
                f"The interrupted step of {self.name!r} had been applied. Call replay() for its updates, or refresh() "
                "to go on without them."
            )

    def _exchange(self, request_id: str, gradients: Gradients, updates: Updates, deadline: float) -> None:
        """Send a step until it is answered, over as many connections as it takes within the deadline."""
        backoff = Backoff(self._connection.config, deadline)
        while True:
            try:
                stream = self._opened(deadline)
                begin = steps_pb2.Begin(request_id=request_id, expected_step=self.current_step)
                # What has been applied is only asked for again; the gradients need not travel.
                applied = stream.opened.last_request_id == request_id
                send = Gradients([], [], whole=True) if applied else gradients
                self.current_step = stream.step(send.frames(begin, self._chunk_bytes(stream)), updates, deadline).step
            except (UnavailableError, StepInProgressError) as error:
                self._close_stream()
                updates.reset()
                backoff.pause(error, self._connection.closed)
            except OptserveError as error:
                # An error in the stream ends the step and not the stream; any other ends both.
                if not error.reason:
                    self._close_stream()
                raise
            # KeyboardInterrupt above all: what is still on its way must not be taken for a later step's reply.
            except BaseException:
                self._close_stream()
                raise
            else:
                return

    def _opened(self, deadline: float) -> StepStream:
        if self._stream is None:
            self._stream = StepStream(self._connection, self._open_request, deadline)
        return self._stream

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

    def _chunk_bytes(self, stream: StepStream) -> int:
        limits = stream.opened.limits
        wanted = self._connection.config.max_chunk_bytes or limits.preferred_chunk_bytes
        return min(wanted, limits.max_chunk_bytes)

    def _taking_part(self, grads: Mapping[str, np.ndarray], *, partial: bool) -> list[int]:
        for name in grads:
            if name not in self._indices:
                raise InvalidArgumentError(f"{self.name!r} has no parameter {name!r}.", metadata={"parameter": name})
        missing = [name for name in self._indices if name not in grads]
        if missing and not partial:
            raise InvalidArgumentError(
                f"There is no gradient for {missing[0]!r}; pass partial=True to leave parameters out of a step.",
                metadata={"parameter": missing[0]},
            )
        if not grads:
            raise InvalidArgumentError("A step needs at least one gradient.")
        return sorted(self._indices[name] for name in grads)

    def _checked(self, index: int, array: np.ndarray, what: str) -> np.ndarray:
        """`array`, if it has the parameter's shape and dtype."""
        parameter = self._parameters[index]
        dtype = DTYPES[parameter.data_type]
        if array.shape != tuple(parameter.shape):
            raise InvalidArgumentError(
                f"The {what} of {parameter.name!r} has shape {list(array.shape)}, not {list(parameter.shape)}.",
                metadata={"parameter": parameter.name},
            )
        if array.dtype != dtype:
            raise InvalidArgumentError(
                f"The {what} of {parameter.name!r} is {array.dtype}, not {dtype}; convert it with .astype.",
                metadata={"parameter": parameter.name},
            )
        return array

    def _arrays(self, indices: list[int], out: Mapping[str, np.ndarray] | None) -> list[np.ndarray]:
        """Arrays for the updates: those of `out`, checked, or new ones."""
        if out is None:
            parameters = [self._parameters[index] for index in indices]
            return [np.empty(tuple(item.shape), DTYPES[item.data_type]) for item in parameters]
        arrays = []
        for index in indices:
            name = self._parameters[index].name
            if name not in out:
                raise InvalidArgumentError(f"`out` has no array for {name!r}.", metadata={"parameter": name})
            array = self._checked(index, out[name], "output")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InvalidArgumentError(
                    f"The output of {name!r} must be a writeable, C-contiguous array.", metadata={"parameter": name}
                )
            arrays.append(array)
        return arrays


def _data_type(name: str, dtype: Any) -> int:
    try:
        return DATA_TYPES[np.dtype(dtype).newbyteorder("<")]
    except (KeyError, TypeError):
        raise InvalidArgumentError(
            f"{name!r} is {dtype}; a parameter's state is float32 or float64.", metadata={"parameter": name}
        ) from None


def _wire_type(wire_dtype: WireDtype) -> int:
    if wire_dtype == "native":
        return optimizer_pb2.DATA_TYPE_UNSPECIFIED
    try:
        return optimizer_pb2.DataType.Value(f"DATA_TYPE_{wire_dtype.upper()}")
    except ValueError:
        raise InvalidArgumentError(
            f"wire_dtype must be native, float32, float64, float16 or bfloat16, not {wire_dtype!r}."
        ) from None
