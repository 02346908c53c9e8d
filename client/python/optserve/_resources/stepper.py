"""What an optimizer object has to make steps with: its stream, and what it knows of the server's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from optserve import settings
from optserve._resources import replies
from optserve._resources.additions import Addition
from optserve._resources.choices import TransportName, WireDtype, shares_memory, wire_type
from optserve._resources.new_optimizer import ArrayLike
from optserve._resources.optimizer import Resource
from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.outcomes import Outcomes
from optserve._steps.session import StepSession
from optserve._steps.streams import KnownState, Streams
from optserve._values.step_settings import KnownSettings
from optserve.state import TensorSpec
from optserve.step_result import StepResult
from optserve.v1 import optimizer_pb2, steps_pb2


class Stepper(Resource):
    """The part of `optserve.Optimizer` that all of its steps share."""

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
            parameter_count=len(self._model),
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

    def __repr__(self) -> str:
        mode = ", hosted" if self.hosted else ""
        return f"{type(self).__name__}({self.name!r}, {self._known.method}{mode}, step {self.current_step})"

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

        None unless the optimizer clips by `norm` or `global_norm`, or the step has asked for it. Also None if the
        client had to resume the step after the server was restarted.
        """
        result = self._session.last_result
        return result.gradient_norm if result is not None and result.HasField("gradient_norm") else None

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last step that has returned; None before the first one."""
        result = self._session.last_result
        if result is None:
            return None
        return StepResult(
            result.step,
            tuple(result.learning_rates),
            result.gradient_norm if result.HasField("gradient_norm") else None,
            result.clipped if result.HasField("clipped") else None,
            result.staleness,
            result.replayed,
        )

    @property
    def takes_curvature(self) -> bool:
        """Whether each step needs the diagonal of the Hessian as well."""
        return self._model.takes_curvature

    @property
    def transport(self) -> tuple[str, str]:
        """(`shm` or `grpc`, the reason for it as a clause). Opens a stream if there is none."""
        stream = self._session.stream(self._connection.patience(self._connection.config.timeout_s))
        return "shm" if stream.shared else "grpc", stream.transport_reason

    @property
    def _outcomes(self) -> Outcomes:
        """The unsettled steps; `optserve.aio` adds to them."""
        return self._session.outcomes

    def add_parameters(
        self,
        params: Mapping[str, ArrayLike | TensorSpec],
        *,
        groups: Sequence[settings.Group] = (),
        timeout_s: float | None = None,
    ) -> None:
        """Give the optimizer more parameters, behind those that it has. The next step of this object takes all of them.

        The slots of the new parameters are 0, and their step counters too: the optimizer is as if it had been created
        with them, and every step had left them out. Everything else stays as it is. They are added exactly once, also
        if the connection is lost.

        Other objects of the same optimizer go on with the parameters that they know; their steps leave the new ones as
        they are. `refresh` lets them know the new ones.

        Args:
            params: The new parameters by name: arrays, tensors, or anything else with a shape and a dtype. In hosted
                mode they need values, which this call uploads.
            groups: New groups, of new parameters only.
            timeout_s: Longest time to wait, `ClientConfig.step_timeout_s` by default.

        Raises:
            InvalidArgumentError: A name is taken; or a name, shape, dtype, value or hyper-parameter is wrong.
            FailedPreconditionError: Workers are alive, or the parameters of a hosted optimizer were not uploaded yet.
            StateReplacedError: The state was replaced by a restore or an import. See `refresh`.
            StepInProgressError: Another connection was in the middle of a step until the time was up.
            ResourceExhaustedError: The model would be too large for the server. It needs memory for the present state
                and for the new one while it adds parameters.
            FeatureUnavailableError: The server is too old. In all these cases nothing was changed.
            DeadlineExceededError: There was no answer in time; `refresh` finds out whether the parameters were added.

        Example:
            >>> opt.add_parameters({"head.w": w, "head.b": b})               # doctest: +SKIP
            ... opt.step(grads)                                              # with those of head.w and head.b
        """
        addition = Addition(self._resource, self._known, params, groups, hosted=self.hosted)
        patience = self._connection.patience(timeout_s)
        with self._session.locked(patience):
            answer = addition.send(self._connection, self._session.known.lineage, patience)
            if not self._take_parameters_of(answer):
                raise replies.invalid_reply("the parameters that were added are not behind the others")

    def _take_parameters_of(self, optimizer: optimizer_pb2.Optimizer) -> bool:
        """Know the parameters that were added since, if there are any; call it with the session locked."""
        self._known = KnownSettings.of(optimizer)
        table = self._table(optimizer.parameters)
        is_continued = self._model.is_continued_by(table)
        if is_continued:
            self._model = table
            self._session.streams.renew(table.sizes)
        return is_continued

    def _read_settings(self, patience: Patience) -> bool:
        """Read the settings again; returns whether the groups and the kind of weight decay are the known ones."""
        present = KnownSettings.of(self._get(max(patience.left_s, 0.001)))
        is_same = present.has_groups_of(self._known)
        if is_same:
            self._known = present
        return is_same

    def refresh(self) -> None:
        """Read the current step, lineage and parameters from the server, and forget the unsettled steps."""
        self._refresh(self._connection.patience(self._connection.config.timeout_s))

    def _refresh(self, patience: Patience) -> None:
        def read() -> tuple[int, str]:
            found = self._get(max(patience.left_s, 0.001))
            self._session.known.create_time = found.create_time
            self._take_parameters_of(found)
            return found.step, found.lineage

        self._session.refresh(read, patience)

    def _on_state_replaced(self, optimizer: optimizer_pb2.Optimizer) -> None:
        self._known = KnownSettings.of(optimizer)
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
