"""An optimizer on the server, for users: it takes gradients by name, and returns updates by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from optserve._resources.choices import ReplyName, TransportName, WireDtype, reply_of, shares_memory, wire_type
from optserve._resources.optimizer import Resource
from optserve._resources.parameter_table import empty
from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.gradients import Gradients
from optserve._steps.incremental import IncrementalGradients, StepUnderWay
from optserve._steps.outcomes import Outcomes
from optserve._steps.session import StepSession
from optserve._steps.shared_memory import GRADIENT, SharedBuffers
from optserve._steps.streams import KnownState, Streams
from optserve._steps.updates import Updates
from optserve.errors import InvalidArgumentError
from optserve.v1 import optimizer_pb2, steps_pb2


class Optimizer(Resource):
    """An optimizer on the server. It makes one step at a time, also if several threads call it.

    Attributes:
        name: The name that `create_optimizer` got.
        hosted: Whether the server holds the parameters as well.
    """

    def __init__(
        self,
        connection: Connection,
        message: optimizer_pb2.Optimizer,
        *,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
        error_feedback: bool = False,
        worker: str = "",
        register: Callable[[float], object] | None = None,
    ) -> None:
        super().__init__(connection, message, wire_type(wire_dtype))
        share, must_share = shares_memory(connection, transport, wire_dtype)
        open_request = steps_pb2.Open(
            name=message.name,
            wire_type=self._wire_type,
            transport=steps_pb2.TRANSPORT_SHARED_MEMORY if share else steps_pb2.TRANSPORT_STREAM,
            max_chunk_bytes=connection.config.max_chunk_bytes,
            worker=worker,
        )
        streams = Streams(
            connection,
            open_request,
            KnownState(message.step, message.lineage, message.create_time),
            self._model.sizes,
            must_share=must_share,
            takes_curvature=self._model.takes_curvature,
        )
        rounds = error_feedback and self._wire is not None
        self._session = StepSession(
            connection, streams, register=register, feedback=ErrorFeedback() if rounds else None
        )
        self._shared_buffers: SharedBuffers | None = None

    def __repr__(self) -> str:
        mode = ", hosted" if self.hosted else ""
        return f"{type(self).__name__}({self.name!r}, {self._method}{mode}, step {self.current_step})"

    @property
    def current_step(self) -> int:
        """Steps that the server has applied, as far as this object knows."""
        return self._session.known.step

    @property
    def steps_made(self) -> int:
        """Steps that this object has made."""
        return self._session.life.steps_made

    @property
    def gradient_norm(self) -> float | None:
        """The Euclidean norm of the last step's gradient over all tensors, before clipping.

        None unless the optimizer clips by `norm` or `global_norm`. Also None if the client had to resume the step after
        a lost connection.
        """
        return self._session.gradient_norm

    @property
    def takes_curvature(self) -> bool:
        """Whether each step needs the diagonal of the Hessian as well."""
        return self._model.takes_curvature

    @property
    def transport(self) -> tuple[str, str]:
        """(`shm` or `grpc`, the reason for it as a clause). Opens a stream if there is none."""
        stream = self._session.stream(self._connection.patience(self._connection.config.timeout_s))
        return "shm" if stream.shared else "grpc", stream.transport_reason

    def buffers(self) -> dict[str, np.ndarray]:
        """An array for each parameter, for gradients and updates that `step` does not have to copy.

        With shared memory they are regions of the server's segment. Call this before each step: after a lost connection
        there is another segment, and the old arrays are ordinary memory.

        Example:
            >>> arrays = opt.buffers()                   # doctest: +SKIP
            ... compute_gradients(into=arrays)
            ... updates = opt.step(arrays, out=arrays)   # the same arrays
        """
        shared = self._session.stream(self._connection.patience(self._connection.config.timeout_s)).shared
        arrays: dict[str, np.ndarray] = {}
        for index, item in enumerate(self._model.parameters):
            arrays[item.name] = (
                shared.array(GRADIENT, index, item.shape, item.dtype) if shared else empty(item.shape, item.dtype)
            )
        if shared:
            shared.mark_dirty()
            buffers = list(arrays.values())
            if self._shared_buffers is None or not self._shared_buffers.consist_of(buffers):
                self._shared_buffers = SharedBuffers(buffers)
        return arrays

    def step(
        self,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        partial: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Send the gradients of one step, and receive its updates.

        The step is applied exactly once. If the connection is lost, the client connects again and sends the step under
        the same request id.

        Args:
            grads: The gradient of every parameter, in the parameter's shape and dtype.
            curvature: The diagonal of the Hessian for each gradient, in the same form, for methods that take it.
            out: Arrays for the reply, which may be the arrays of the gradients; new ones are made by default. If the
                step raises, they are unchanged; but of a reply of more than 1 MiB over gRPC, the first elements, in
                the order of the parameters, may be overwritten. The server uses arrays of `buffers` until the step
                returns.
            reply: `updates` for Δx; in hosted mode also `parameters` for the new x, or `nothing`.
            partial: Allow parameters to be absent; they and their state stay as they are.
            timeout_s: Longest time to wait, `ClientConfig.step_timeout_s` by default.

        Returns:
            The reply by name: the updates Δx, to be added to the parameters, unless `reply` says otherwise.

        Raises:
            InvalidArgumentError: A name, shape, dtype or value is wrong; nothing was changed.
            WrongStepError: Another client has made a step of this optimizer; nothing was changed. See `refresh`.
            StepInDoubtError: An earlier, interrupted step was applied, or may have been. See `replay` and `refresh`.
            UnavailableError: The server accepts no step now; the message says why.
            StepInProgressError: Another connection was in the middle of a step until the time was up.
            DeadlineExceededError, StepCancelledError: There was no answer in time; the next call finds out whether
                the step was applied. It is an UnreachableError if no server was reached.
        """
        return self._step(
            self._connection.patience(timeout_s), grads, curvature=curvature, out=out, reply=reply, partial=partial
        )

    def _step(
        self,
        patience: Patience,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        partial: bool = False,
    ) -> dict[str, np.ndarray]:
        """Make a step within the given patience, see `step`."""
        indices = self._model.selected_indices(grads, partial=partial)
        names = self._model.names_of(indices)
        arrays = [self._model.contiguous(i, grads[name], "gradient") for i, name in zip(indices, names, strict=True)]
        diagonals = None
        if curvature is not None or self._model.takes_curvature:
            diagonals = self._model.diagonals(indices, curvature)
        if self._shared_buffers is not None:
            # Copied first, because the step will write the gradient of another parameter there.
            arrays = [
                array.copy() if self._shared_buffers.belongs_to_another(index, array) else array
                for index, array in zip(indices, arrays, strict=True)
            ]
        updates = self._updates_for(indices, out, reply)
        gradients = Gradients(
            indices, arrays, whole=len(indices) == len(self._model.parameters), wire=self._wire, curvature=diagonals
        )
        self._session.step(gradients, updates, patience)
        return self._by_name(updates)

    def _updates_for(self, indices: list[int], out: Mapping[str, np.ndarray] | None, reply: ReplyName) -> Updates:
        """The arrays for the reply of a step."""
        wanted_reply = reply_of(reply)
        wanted = indices if wanted_reply != steps_pb2.REPLY_NOTHING else []
        arrays = self._model.outputs(wanted, out)
        if out is not None and self._shared_buffers is not None:
            self._check_buffers(self._shared_buffers, wanted, arrays)
        return Updates(wanted, arrays, self._layouts, wanted_reply)

    def _check_buffers(self, buffers: SharedBuffers, indices: list[int], arrays: list[np.ndarray]) -> None:
        """Raise InvalidArgumentError for an array of `buffers` that belongs to another parameter."""
        for index, array in zip(indices, arrays, strict=True):
            if buffers.belongs_to_another(index, array):
                name = self._model.parameters[index].name
                raise InvalidArgumentError(
                    f"The array for {name!r} is in the buffer of another parameter; pass buffers()[{name!r}] itself, "
                    "or a copy.",
                    metadata={"parameter": name},
                )

    def _by_name(self, updates: Updates) -> dict[str, np.ndarray]:
        return dict(zip(self._model.names_of(updates.indices), updates.arrays, strict=True))

    @contextmanager
    def begin_step(
        self,
        names: Iterable[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        timeout_s: float | None = None,
    ) -> Iterator[StepUnderWay]:
        """Make a step whose gradients are sent while others are still being computed, for the length of a with-block.

        Leaving the block commits the step and waits for the updates. Leaving it by an exception abandons the step.

        Args:
            names: Parameters that take part; all by default.
            out: As for `step`.
            reply: As for `step`.
            timeout_s: As for `step`; it includes the time in which the gradients are computed.

        Raises:
            OptserveError: As for `step`, from `send` or at the end of the block.

        Example:
            >>> with opt.begin_step() as step:                  # doctest: +SKIP
            ...     for name, gradient in backward():
            ...         step.send(name, gradient)
            ... updates = step.updates
        """
        step = self._start_step(self._connection.patience(timeout_s), names, out=out, reply=reply)
        try:
            yield step
            step._finish()
        except BaseException:
            applied = step._abort()
            if applied:
                self._outcomes.undelivered(applied)
            raise

    def _start_step(
        self,
        patience: Patience,
        names: Iterable[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
    ) -> StepUnderWay:
        """Begin a step whose gradients are sent one by one; `begin_step` and `optserve.aio` use it."""
        indices = self._model.indices_of(self._model.names if names is None else names)
        gradients = IncrementalGradients(
            indices,
            whole=len(indices) == len(self._model),
            wire=self._wire,
            patience=patience,
            with_curvature=self._model.takes_curvature,
        )
        updates = self._updates_for(indices, out, reply)

        def check(
            name: str, gradient: np.ndarray, curvature: np.ndarray | None
        ) -> tuple[int, np.ndarray, np.ndarray | None]:
            (index,) = self._model.indices_of([name])
            array = self._model.contiguous(index, gradient, "gradient")
            if self._shared_buffers is not None:
                self._check_buffers(self._shared_buffers, [index], [array])
            diagonals = self._model.diagonals([index], None if curvature is None else {name: curvature})
            return index, array, diagonals[0] if diagonals else None

        def run() -> tuple[str, dict[str, np.ndarray]]:
            request_id = self._session.step(gradients, updates, patience)
            return request_id, self._by_name(updates)

        return StepUnderWay(gradients, check, {i: self._model.parameters[i].name for i in indices}, run, patience)

    @property
    def _outcomes(self) -> Outcomes:
        """The unsettled steps; `optserve.aio` adds to them."""
        return self._session.outcomes

    def replay(self, *, reply: ReplyName = "updates", timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """Receive the reply of the last applied step once more, the same bytes.

        Call it for a step that was interrupted after the server had applied it.

        Raises:
            FailedPreconditionError: There is no such step, the interrupted step was not applied, or the server no
                longer has its reply.
        """
        updates: list[Updates] = []

        def make_updates(tensors: list[int]) -> Updates:
            updates.append(self._updates_for(tensors or list(range(len(self._model))), None, reply))
            return updates[-1]

        self._session.replay(make_updates, self._connection.patience(timeout_s))
        return self._by_name(updates[-1])

    def refresh(self) -> None:
        """Read the current step and lineage from the server, and forget the unsettled steps."""
        self._refresh(self._connection.patience(self._connection.config.timeout_s))

    def _refresh(self, patience: Patience) -> None:
        def read() -> tuple[int, str]:
            found = self._get(max(patience.left_s, 0.001))
            self._session.known.create_time = found.create_time
            return found.step, found.lineage

        self._session.refresh(read, patience)

    def _on_state_replaced(self, optimizer: optimizer_pb2.Optimizer) -> None:
        patience = self._connection.patience(self._connection.config.timeout_s)
        self._session.refresh(lambda: (optimizer.step, optimizer.lineage), patience)

    def cancel(self) -> None:
        """Interrupt the step that another thread is making, if there is one; it raises StepCancelledError there."""
        self._session.cancel()

    def close(self, *, for_good: bool = False) -> None:
        """Close this object's stream. The optimizer itself stays on the server.

        Args:
            for_good: Interrupt the step that another thread is making, and refuse every later step. Otherwise wait for
                that step; the next step opens another stream.
        """
        if for_good:
            self._session.leave()
        else:
            self._session.close()
