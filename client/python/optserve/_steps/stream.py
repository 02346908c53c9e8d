"""One StreamSteps call on the client's side: sends the messages of a step, and copies the reply into arrays."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain

import grpc
from google.protobuf.message import DecodeError

from optserve import _reasons
from optserve._common import wire
from optserve._common.control import MAX_PACKET_BYTES, ControlConnection
from optserve._rpc.connection import Connection, not_a_message
from optserve._rpc.deadline import Patience
from optserve._steps.gradients import Gradients
from optserve._steps.outgoing import Outgoing
from optserve._steps.shared_memory import SharedStaging
from optserve._steps.updates import Updates
from optserve.config import ClientConfig
from optserve.errors import (
    DeadlineExceededError,
    FeatureUnavailableError,
    InternalError,
    OptserveError,
    UnavailableError,
    from_status,
)
from optserve.v1 import steps_pb2

MIN_CHUNK_BYTES = 1024
"""The smallest chunk limit that the contract allows."""


class StepStream:
    """An open stream of steps on one optimizer. It is closed when it is garbage-collected.

    Args:
        connection: To the server.
        request: The first message.
        patience: How long to wait for the server's answer.
        sizes: (bytes, bytes of an element) of each parameter.
        takes_curvature: Whether the method takes the diagonal of the Hessian.

    Attributes:
        opened: The server's answer to `open`.
        shared: The segment through which tensors travel; None if they travel in messages.
        transport_reason: Why tensors travel this way, as a clause.

    Raises:
        OptserveError: The stream could not be opened.
    """

    def __init__(
        self,
        connection: Connection,
        request: steps_pb2.Open,
        patience: Patience,
        sizes: Sequence[tuple[int, int]],
        *,
        takes_curvature: bool = False,
    ) -> None:
        self._connection = connection
        self._takes_curvature = takes_curvature
        self._worker = request.worker
        self._parameter_count = len(sizes)
        self._outgoing = Outgoing(connection.clock)
        self._outgoing.put(iter([wire.encode(steps_pb2.StreamStepsRequest(open=request))]))
        self._call = connection.stream_steps(iter(self._outgoing))
        # Carries short messages faster than gRPC, where memory is shared.
        self._control: ControlConnection | None = None
        self._end_call = weakref.finalize(self, _end_call, self._outgoing, self._call)
        connection.close_with_connection(self)
        try:
            try:
                with patience.watching(self._interrupt):
                    first = self._next_message(patience).header
            except DeadlineExceededError as error:
                raise connection.late(patience.timeout_s) from error
            self.opened: steps_pb2.Opened = first.opened
            if not first.HasField("opened"):
                raise InternalError("The server's first answer on a stream does not say that it is open.")
            if len(set(self.opened.last_tensors)) < len(self.opened.last_tensors) or any(
                tensor >= len(sizes) for tensor in self.opened.last_tensors
            ):
                raise InternalError("The server's `last_tensors` has an unknown index, or one index twice.")
            self._chunk_bytes = _chunk_bytes(self.opened.limits, connection.config)
            self.shared, self.transport_reason = _attach_segment(request, self.opened, sizes, curved=takes_curvature)
            self._nonce = self.shared.nonce if self.shared else b""
            if self.shared is not None:
                self._connect_control(self.shared)
        except BaseException:
            self.close()
            raise

    def _connect_control(self, shared: SharedStaging) -> None:
        try:
            self._control = ControlConnection(self.opened.shared_memory.control_socket, shared.nonce)
        except OSError as error:
            self.transport_reason += f"; control takes gRPC, because the control socket is out of reach: {error}"
        else:
            weakref.finalize(self, self._control.close)

    def step(
        self, request: steps_pb2.StreamStepsRequest, gradients: Gradients | None, updates: Updates, patience: Patience
    ) -> steps_pb2.Result:
        """Make one step and receive its reply.

        Args:
            request: The step's first message; it has the request id and the expected step.
            gradients: None to ask for the reply of a step that was applied before.
            updates: The arrays for the reply.
            patience: How long to wait.

        Raises:
            StepRefused: The server's error about this step; the stream can be used again.
            UnavailableError: The connection was lost; the step may have been applied.
            DeadlineExceededError, StepCancelledError: The patience has ended; the step may have been applied.
        """
        begin = request.begin
        if gradients is not None:
            # Another thread may have added parameters since the gradients were collected.
            if not (gradients.whole and len(gradients.indices) == self._parameter_count):
                begin.tensors.extend(gradients.indices)
            if gradients.options is not None:
                begin.settings.extend(gradients.options.settings)
                begin.with_gradient_norm = gradients.options.with_gradient_norm
                begin.etag = gradients.options.etag
        begin.with_curvature, begin.reply = self._takes_curvature, updates.reply
        if self._nonce:
            begin.shared_memory_nonce, self._nonce = self._nonce, b""
        if self.shared is not None and gradients is not None:
            self.shared.put(gradients.arrivals())
        with patience.watching(self._interrupt):
            receive = self._send(request, gradients)
            while True:
                header, data = receive(patience)
                if header.HasField("error"):
                    self._outgoing.stop_step()
                    raise self._refusal(begin, header.error, replied=updates.received)
                if data is not None and self.shared is None:
                    updates.put(header.chunk.tensor, header.chunk.offset, data)
                elif data is not None or header.data or not header.HasField("result"):
                    raise InternalError("The server has answered a step with a message of another kind.")
                if header.HasField("result"):
                    break
                updates.write_large()
        result = header.result
        self._check_result(begin, result, sent=gradients is not None)
        if self.shared is not None:
            self.shared.get(updates.by_index())
        else:
            updates.finish()
        return result

    def _check_result(self, begin: steps_pb2.Begin, result: steps_pb2.Result, *, sent: bool) -> None:
        """Raise InternalError unless a result can belong to the step; `sent` if its gradients were sent."""
        if not sent:
            # The last step that was applied when the stream was opened. A worker's may be older than those of others.
            right = result.replayed and result.step <= self.opened.step
            right &= result.step == self.opened.step or bool(self._worker)
        elif begin.HasField("expected_step"):
            right = result.step == begin.expected_step + 1
        elif begin.HasField("parameters_step") and not result.replayed:
            right = result.step == begin.parameters_step + result.staleness + 1
        else:
            right = result.step > 0
        if result.request_id != begin.request_id or not right:
            raise InternalError(
                f"The server has answered step {result.step} with request id {result.request_id[:80]!r}; this client "
                f"asked for request id {begin.request_id!r}."
            )

    def _refusal(self, begin: steps_pb2.Begin, message: steps_pb2.StepError, *, replied: bool) -> Exception:
        """The exception for the server's error about a step; `replied` if part of its reply was received."""
        error = from_status(message.status)
        if message.request_id not in ("", begin.request_id):
            return InternalError(f"The server's error is about another step: {error}")
        # The step was applied, since its reply has begun. Only these errors can still follow.
        if replied and error.reason not in (_reasons.STEP_TAKEN_OVER, _reasons.INTERNAL):
            return InternalError(f"The server refuses a step in the middle of its reply: {error}")
        return StepRefused(error)

    def _send(
        self, request: steps_pb2.StreamStepsRequest, gradients: Gradients | None
    ) -> Callable[[Patience], wire.ResponseFrame]:
        """Send a step's messages. Returns the function that receives the next message of the answer."""
        if self.shared is None and gradients is not None:
            announce = bool(self._worker)
            message = gradients.single_message(request, self._chunk_bytes, announce=announce)
            if message is not None:
                self._outgoing.put(iter((message,)))
                return self._next_message
            messages = gradients.messages(request, self._chunk_bytes, announce=announce)
            # The first message is made in this thread, before the sending thread wakes up.
            self._outgoing.put(messages if gradients.incremental else chain([next(messages)], messages))
            return self._next_message
        request.commit.SetInParent()
        message = wire.encode(request)
        if self._control is not None and len(message) <= MAX_PACKET_BYTES:
            self._control.send(message)
            return self._next_packet
        self._outgoing.put(iter([message]))
        return self._next_message

    def check_step_settings(self) -> None:
        """Raise FeatureUnavailableError if this server would ignore what a step asks for beside its reply."""
        if not self.opened.step_settings:
            raise FeatureUnavailableError(
                f"{self._connection.target} is an older server: it has no hyper-parameters of single steps and no "
                "gradient norm on demand (FEATURE_STEP_SETTINGS). Nothing was sent. Change the optimizer's own with "
                "update()."
            )

    def close(self) -> None:
        """End the stream at once. Safe from any thread, and more than once."""
        self._end_call()
        if self._control is not None:
            self._control.shut()

    def _interrupt(self) -> None:
        """Wake the thread that waits for a message. The stream cannot be used any more."""
        self._call.cancel()
        if self._control is not None:
            self._control.shut()

    def _next_packet(self, patience: Patience) -> wire.ResponseFrame:
        packet = self._control.receive() if self._control is not None else b""
        if packet:
            try:
                return wire.decode_response(packet)
            except DecodeError as error:
                raise not_a_message() from error
        patience.check()
        raise UnavailableError(f"{self._connection.target} closed the stream.")

    def _next_message(self, patience: Patience) -> wire.ResponseFrame:
        try:
            return wire.decode_response(next(self._call))
        except DecodeError as no_message:
            raise not_a_message() from no_message
        except StopIteration:
            error: OptserveError = UnavailableError(f"{self._connection.target} closed the stream.")
        except grpc.RpcError as rpc_error:
            # In gRPC the call is its own error. With a traceback it would keep frames for as long as it lives.
            error = self._connection.translate(rpc_error.with_traceback(None), patience.timeout_s)
        fault = self._outgoing.fault
        if isinstance(fault, OptserveError):
            raise fault
        if fault is not None:
            raise InternalError(f"This client failed to make a message of the step: {fault!r}") from fault
        patience.check()
        raise error


class StepRefused(Exception):
    """The server's error about one step, in a stream that lives on.

    Attributes:
        error: The exception for the caller.
    """

    def __init__(self, error: OptserveError) -> None:
        super().__init__(error)
        self.error = error


def _chunk_bytes(limits: steps_pb2.ServerLimits, config: ClientConfig) -> int:
    """The largest payload of one message to a server with those limits, or raise InternalError."""
    preferred = limits.preferred_chunk_bytes or limits.max_chunk_bytes
    if min(preferred, limits.max_chunk_bytes) < MIN_CHUNK_BYTES:
        raise InternalError(
            f"The server's chunk limits are {limits.max_chunk_bytes} and {preferred} bytes; the contract demands at "
            f"least {MIN_CHUNK_BYTES}."
        )
    wanted = config.max_chunk_bytes or preferred
    return min(wanted, limits.max_chunk_bytes, config.max_receive_bytes)


def _attach_segment(
    request: steps_pb2.Open, opened: steps_pb2.Opened, sizes: Sequence[tuple[int, int]], *, curved: bool
) -> tuple[SharedStaging | None, str]:
    """(the shared segment or None, why as a clause)."""
    if request.transport != steps_pb2.TRANSPORT_SHARED_MEMORY:
        return None, "shared memory was not asked for"
    if not opened.HasField("shared_memory"):
        return None, "the server offers no shared memory now: its memory is full, or another client uses the segment"
    try:
        return SharedStaging(opened.shared_memory, sizes, curved=curved), "the server is on this host"
    except OSError as error:
        return None, f"the server's shared memory cannot be reached: {error}"


def _end_call(outgoing: Outgoing, call: grpc.Call) -> None:
    outgoing.end()
    call.cancel()
