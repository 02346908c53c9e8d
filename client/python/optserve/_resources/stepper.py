"""What an optimizer object has to make steps with: its stream, and what it knows of the server's state."""

from __future__ import annotations

from collections.abc import Callable

from optserve._resources.choices import TransportName, WireDtype, shares_memory, wire_type
from optserve._resources.optimizer import Resource
from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.outcomes import Outcomes
from optserve._steps.session import StepSession
from optserve._steps.streams import KnownState, Streams
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

    def refresh(self) -> None:
        """Read the current step and lineage from the server, and forget the unsettled steps."""
        self._refresh(self._connection.patience(self._connection.config.timeout_s))

    def _refresh(self, patience: Patience) -> None:
        def read() -> tuple[int, str]:
            found = self._get(max(patience.left_s, 0.001))
            self._session.known.create_time = found.create_time
            self._groups = len(found.groups)
            return found.step, found.lineage

        self._session.refresh(read, patience)

    def _on_state_replaced(self, optimizer: optimizer_pb2.Optimizer) -> None:
        self._groups = len(optimizer.groups)
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
