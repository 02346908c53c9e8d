"""An optimizer as its users see it: gradients by name in, updates by name out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import EllipsisType
from typing import Literal, TypeVar

import numpy as np

from optserve import algorithms, settings
from optserve._checkpoints import checkpoint_from, delete_checkpoint, list_checkpoints
from optserve._feedback import ErrorFeedback
from optserve._model import Model
from optserve._patience import Patience
from optserve._session import StepSession
from optserve._shared import GRADIENT
from optserve._stream import Gradients, Updates
from optserve._transfer import export_state, import_state
from optserve._transport import Transport
from optserve._under_way import GrowingGradients, StepUnderWay
from optserve.errors import FeatureUnavailableError, InvalidArgumentError
from optserve.state import Checkpoint, OptimizerState, Progress, no_progress
from optserve.statistics import QUANTILES, Statistics, statistics_from
from optserve.v1 import checkpoints_pb2, optimizer_pb2, service_pb2, statistics_pb2, steps_pb2
from optserve.wire import WIRE_DTYPES

WireDtype = Literal["native", "float32", "float64", "float16", "bfloat16"]
TransportName = Literal["auto", "grpc", "shm"]

_Response = TypeVar("_Response")


class Optimizer:
    """An optimizer on the server. Its steps come one after the other, also from several threads.

    Attributes:
        name: As given to `create_optimizer`.
    """

    def __init__(
        self,
        connection: Transport,
        message: optimizer_pb2.Optimizer,
        *,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
        error_feedback: bool = False,
    ) -> None:
        self._connection = connection
        if transport == "auto":
            transport = connection.config.transport
        if transport == "shm" and wire_dtype != "native":
            raise InvalidArgumentError("In shared memory tensors are not converted; leave wire_dtype at 'native'.")
        if transport == "shm" and not connection.same_host:
            raise FeatureUnavailableError(
                f"Shared memory cannot be used: {connection.target} is not on this host, or belongs to another user."
            )
        share = connection.same_host and transport != "grpc" and wire_dtype == "native"
        open_request = steps_pb2.Open(
            name=message.name,
            wire_type=_wire_type(wire_dtype),  # pyright: ignore[reportArgumentType]
            transport=steps_pb2.TRANSPORT_SHARED_MEMORY if share else steps_pb2.TRANSPORT_STREAM,
            max_chunk_bytes=connection.config.max_chunk_bytes,
        )
        self._method = message.algorithm.WhichOneof("method") or ""
        method = algorithms.ALGORITHMS.get(self._method)
        self._model = Model(
            message.name.removeprefix("optimizers/"),
            message.parameters,
            takes_curvature=method is not None and method.takes_curvature,
        )
        self._session = StepSession(
            connection,
            open_request,
            message.step,
            message.lineage,
            must_share=transport == "shm",
            takes_curvature=self._model.takes_curvature,
        )
        self._wire = WIRE_DTYPES.get(open_request.wire_type)
        self._feedback = ErrorFeedback(self._wire) if error_feedback and self._wire is not None else None
        self._slots = list(message.slots)
        self._resource = message.name
        self.name = message.name.removeprefix("optimizers/")

    @property
    def current_step(self) -> int:
        """Steps that the server has applied, as far as this object knows."""
        return self._session.current_step

    @property
    def takes_curvature(self) -> bool:
        """Whether each step brings the diagonal of the Hessian as well."""
        return self._model.takes_curvature

    @property
    def transport(self) -> tuple[str, str]:
        """How tensors travel, `shm` or `grpc`, and why; opens a stream if there is none."""
        stream = self._session.stream(self._connection.patience(self._connection.config.timeout_s))
        return "shm" if stream.shared else "grpc", stream.transport_reason

    def buffers(self) -> dict[str, np.ndarray]:
        """An array for each parameter, in which `step` finds gradients and leaves updates without copying either.

        Where memory is shared with the server, these are its staging area. Ask for them anew before each step; after
        a lost connection they are others, and the old ones are ordinary arrays.

        Example:
            >>> arrays = opt.buffers()                   # doctest: +SKIP
            ... compute_gradients(into=arrays)
            ... updates = opt.step(arrays, out=arrays)   # the same arrays
        """
        shared = self._session.stream(self._connection.patience(self._connection.config.timeout_s)).shared
        arrays: dict[str, np.ndarray] = {}
        for index, item in enumerate(self._model.parameters):
            arrays[item.name] = (
                shared.array(GRADIENT, index, item.shape, item.dtype) if shared else np.empty(item.shape, item.dtype)
            )
        if shared:
            shared.touch()
        return arrays

    def step(
        self,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        partial: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Send the gradients of one step, get its updates.

        The step is applied exactly once: if the connection is lost on the way, it is made again and the step is
        resumed under the same request id.

        Args:
            grads: The gradient of every parameter, in the parameter's shape and dtype.
            curvature: The diagonal of the Hessian for each of them, likewise, for the methods that take it.
            out: Arrays that take the updates, which may be those of the gradients; new ones are made by default.
            partial: Allow parameters to be absent; they and their state stay as they are.
            timeout_s: Longest time to wait, `ClientConfig.step_timeout_s` by default.

        Returns:
            The updates Δx by name, to be added to the parameters.

        Raises:
            InvalidArgumentError: A name, shape, dtype or value that cannot be used; nothing was changed.
            WrongStepError: Somebody else has stepped this optimizer; nothing was changed. See `refresh`.
            StepInDoubtError: An earlier step that was interrupted had been applied. See `replay`.
            UnavailableError, DeadlineExceededError, StepCancelledError: No answer; the next call finds out what became
                of the step.
        """
        return self.step_patiently(self.patience(timeout_s), grads, curvature=curvature, out=out, partial=partial)

    def patience(self, timeout_s: float | None = None) -> Patience:
        """A patience for `step_patiently`, which ends after `timeout_s` or when it is cancelled."""
        return self._connection.patience(timeout_s)

    def step_patiently(
        self,
        patience: Patience,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        partial: bool = False,
    ) -> dict[str, np.ndarray]:
        """`step` with a patience that the caller can end; what `optserve.aio` is made of."""
        indices = self._model.taking_part(grads, partial=partial)
        names = [self._model.parameters[index].name for index in indices]
        arrays = [
            self._model.contiguous(index, grads[name], "gradient") for index, name in zip(indices, names, strict=True)
        ]
        diagonals = self._model.diagonals(indices, curvature)
        updates = self._model.outputs(indices, out)
        if self._feedback is not None:
            arrays = self._feedback.compensated(indices, arrays)
        gradients = Gradients(
            indices, arrays, whole=len(indices) == len(self._model), wire=self._wire, curvature=diagonals
        )
        self._session.step(gradients, Updates(indices, updates, self._wire), patience)
        if self._feedback is not None:
            self._feedback.keep(indices, arrays)
        return dict(zip(names, updates, strict=True))

    @contextmanager
    def begin_step(
        self,
        names: Iterable[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[StepUnderWay]:
        """Make a step whose gradients are sent while others are still being computed, for the length of a with-block.

        Leaving the block applies the step and waits for the updates; leaving it by an exception gives the step up.

        Args:
            names: Parameters that take part; all by default.
            out: As for `step`.
            timeout_s: As for `step`; the time in which gradients are computed counts.

        Raises:
            OptserveError: As for `step`, from `send` or at the end of the block.

        Example:
            >>> with opt.begin_step() as step:                  # doctest: +SKIP
            ...     for name, gradient in backward():
            ...         step.send(name, gradient)
            ... updates = step.updates
        """
        wanted = self._model.names if names is None else list(names)
        indices = self._model.taking_part(dict.fromkeys(wanted), partial=True)
        gradients = GrowingGradients(
            indices,
            whole=len(indices) == len(self._model),
            wire=self._wire,
            with_curvature=self._model.takes_curvature,
        )
        updates = self._model.outputs(indices, out)
        patience = self.patience(timeout_s)

        def check(
            name: str, gradient: np.ndarray, curvature: np.ndarray | None
        ) -> tuple[int, np.ndarray, np.ndarray | None]:
            (index,) = self._model.taking_part({name: gradient}, partial=True)
            array = self._model.contiguous(index, gradient, "gradient")
            if self._feedback is not None:
                (array,) = self._feedback.compensated([index], [array])
            diagonals = self._model.diagonals([index], None if curvature is None else {name: curvature})
            return index, array, diagonals[0] if diagonals else None

        def run() -> dict[str, np.ndarray]:
            self._session.step(gradients, Updates(indices, updates, self._wire), patience)
            if self._feedback is not None:
                sent = [arrival for arrival in gradients.arrivals() if arrival and arrival[0] == GRADIENT]
                self._feedback.keep([index for _, index, _ in sent], [array for _, _, array in sent])
            return {self._model.parameters[index].name: update for index, update in zip(indices, updates, strict=True)}

        step = StepUnderWay(gradients, check, {i: self._model.parameters[i].name for i in indices}, run, patience)
        try:
            yield step
        except BaseException:
            step.abort()
            raise
        step.finish()

    def undelivered(self) -> None:
        """The last step's updates did not reach who had asked for them; the next step will say so."""
        self._session.undelivered()

    def replay(self, *, timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """The updates of the last applied step once more, the same bytes.

        For a step whose call was interrupted after the server had applied it.

        Raises:
            FailedPreconditionError: There is no such step, the interrupted one was not applied, or its reply is no
                longer retained.
        """
        updates: dict[str, np.ndarray] = {}

        def make_updates(tensors: list[int]) -> Updates:
            indices = tensors or list(range(len(self._model)))
            arrays = self._model.outputs(indices, None)
            updates.update(
                (self._model.parameters[index].name, array) for index, array in zip(indices, arrays, strict=True)
            )
            return Updates(indices, arrays, self._wire)

        self._session.replay(make_updates, self.patience(timeout_s))
        return updates

    def refresh(self) -> None:
        """Read the current step from the server, giving up what this object believed."""

        def read() -> tuple[int, str]:
            found = self._get()
            return found.step, found.lineage

        self._session.refresh(read)

    def update(
        self,
        algorithm: algorithms.Algorithm | None = None,
        *,
        schedule: settings.Schedule | EllipsisType | None = ...,
        clipping: settings.Clipping | EllipsisType | None = ...,
        groups: Sequence[settings.Group] | EllipsisType = ...,
    ) -> None:
        """Change settings from the next step on; the state stays, and so does what is not given.

        Args:
            algorithm: The same method with other hyper-parameters.
            schedule: Another one, or None for a constant learning rate.
            clipping: Another bound, or None for none.
            groups: All of them anew.

        Raises:
            InvalidArgumentError: Another method, or a value out of range.
        """
        request = settings.update_request(self._resource, self._method, algorithm, schedule, clipping, groups)
        self._connection.call(self._connection.stub.UpdateOptimizer, request)

    @property
    def algorithm(self) -> algorithms.Algorithm:
        """The method with its present hyper-parameters, as the server has them."""
        return algorithms.from_message(self._get().algorithm)

    @property
    def schedule(self) -> settings.Schedule | None:
        """The present schedule of the learning rate, as the server has it."""
        return settings.schedule_from(self._get())

    @property
    def clipping(self) -> settings.Clipping | None:
        """The present bound on the gradient, as the server has it."""
        return settings.clipping_from(self._get())

    @property
    def groups(self) -> tuple[settings.Group, ...]:
        """The present groups of parameters, as the server has them."""
        return settings.groups_from(self._get())

    def statistics(
        self,
        names: Sequence[str] = (),
        *,
        quantiles: Sequence[float] = QUANTILES,
        indices: Sequence[int] = (),
        random_indices: int = 0,
        seed: int = 0,
    ) -> Statistics:
        """Look at the state between two steps, which go on meanwhile.

        Args:
            names: Parameters to look at; all by default.
            quantiles: Of the effective learning rate, each in [0, 1].
            indices: Flat indices of elements to look at, of each parameter.
            random_indices: Instead of them, how many to draw of each.
            seed: Of the draw.

        Raises:
            InvalidArgumentError: There is no such parameter, element or quantile.
        """
        request = statistics_pb2.GetStatisticsRequest(
            name=self._resource,
            tensors=self._model.taking_part(dict.fromkeys(names), partial=True) if names else (),
            quantiles=quantiles,
            indices=indices,
            random_indices=random_indices,
            seed=seed,
        )
        response = self._connection.call(self._connection.stub.GetStatistics, request)
        return statistics_from(response, self._model.names, self._slots, list(quantiles) or QUANTILES)

    def save_checkpoint(self, tag: str, *, overwrite: bool = False) -> Checkpoint:
        """Take a named copy of the state and the hyper-parameters, durable as far as the server is.

        It outlives the optimizer, until it is deleted itself.

        Args:
            tag: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit.
            overwrite: Replace a copy of that name.

        Raises:
            AlreadyExistsError: The tag is taken, unless `overwrite`.
            UnavailableError: The server's disk did not take it, or no server answers.
        """
        request = checkpoints_pb2.SaveCheckpointRequest(
            parent=self._resource, tag=tag, overwrite=overwrite, request_id=str(uuid.uuid4())
        )
        return checkpoint_from(self._call_patiently(self._connection.stub.SaveCheckpoint, request).checkpoint)

    def list_checkpoints(self) -> list[Checkpoint]:
        """All named copies, oldest first."""
        return list_checkpoints(self._connection, self._resource)

    def restore_checkpoint(self, tag: str) -> None:
        """Roll state, hyper-parameters and step counter back to a named copy. Other clients are told.

        Raises:
            NotFoundError: There is no such tag.
            FailedPreconditionError: It is of another method or of other parameters.
            CheckpointDamagedError: Its file is damaged. In all cases nothing was changed.
        """
        request = checkpoints_pb2.RestoreCheckpointRequest(
            name=f"{self._resource}/checkpoints/{tag}", request_id=str(uuid.uuid4())
        )
        restored = self._call_patiently(self._connection.stub.RestoreCheckpoint, request).optimizer
        self._session.refresh(lambda: (restored.step, restored.lineage))

    def delete_checkpoint(self, tag: str) -> None:
        """Delete a named copy.

        Raises:
            NotFoundError: There is no such tag.
        """
        delete_checkpoint(self._connection, self._resource, tag)

    def export_state(self, *, on_progress: Progress = no_progress) -> OptimizerState:
        """Read the whole state, all of one step; other clients may step meanwhile."""
        return export_state(self._connection, self._resource, on_progress)

    def import_state(self, state: OptimizerState, *, on_progress: Progress = no_progress) -> None:
        """Replace state and step counter; the hyper-parameters stay. Other clients are told.

        Raises:
            InvalidArgumentError: The state is of another method or other parameters, or has a NaN, an infinity, or a
                negative mean of squares. Nothing was changed.
        """
        imported = import_state(self._connection, self._get(), state, on_progress)
        self._session.refresh(lambda: (imported.step, imported.lineage))

    def _call_patiently(self, method: Callable[..., _Response], request: object) -> _Response:
        """Call a method that takes as long as the state is large."""
        return self._connection.call(method, request, timeout_s=self._connection.config.step_timeout_s)

    def cancel(self) -> None:
        """Interrupt the step that another thread is in the middle of, if there is one; it raises there."""
        self._session.cancel()

    def close(self) -> None:
        """Close this object's stream; the optimizer itself stays on the server."""
        self._session.close()

    def _get(self) -> optimizer_pb2.Optimizer:
        request = service_pb2.GetOptimizerRequest(name=self._resource)
        return self._connection.call(self._connection.stub.GetOptimizer, request).optimizer


def _wire_type(wire_dtype: WireDtype) -> int:
    if wire_dtype == "native":
        return optimizer_pb2.DATA_TYPE_UNSPECIFIED
    try:
        return optimizer_pb2.DataType.Value(f"DATA_TYPE_{wire_dtype.upper()}")
    except ValueError:
        raise InvalidArgumentError(
            f"wire_dtype must be native, float32, float64, float16 or bfloat16, not {wire_dtype!r}."
        ) from None
