"""One StreamSteps call from the client's side: sends the frames of a step, puts the reply into arrays."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain

import grpc
from google.protobuf.message import DecodeError

from optserve import _reasons
from optserve._common import wire
from optserve._common.control import MAX_PACKET_BYTES, ControlConnection
from optserve._rpc.connection import Transport, readable
from optserve._rpc.deadline import Patience
from optserve._steps.gradients import Gradients
from optserve._steps.outgoing import Outgoing
from optserve._steps.shared_memory import SharedStaging
from optserve._steps.updates import Updates
from optserve.config import ClientConfig
from optserve.errors import InternalError, OptserveError, UnavailableError, from_status
from optserve.v1 import steps_pb2

MIN_CHUNK_BYTES = 1024
"""The contract has no chunk limits below this."""


class StepStream:
    """An open stream of steps on one optimizer. It closes itself when nobody uses it any more.

    Args:
        transport: The connection.
        request: What the stream is opened with.
        patience: How long to wait for the server's answer.
        sizes: (bytes, bytes of an element) of each parameter.
        takes_curvature: Whether the method takes the diagonal of the Hessian.

    Attributes:
        opened: The server's answer to `open`.
        shared: Memory shared with the server, through which tensors travel then; None if they travel in messages.
        transport_reason: Why, in words.

    Raises:
        OptserveError: It could not be opened.
    """

    def __init__(
        self,
        transport: Transport,
        request: steps_pb2.Open,
        patience: Patience,
        sizes: Sequence[tuple[int, int]],
        *,
        takes_curvature: bool = False,
    ) -> None:
        self._transport = transport
        self._takes_curvature = takes_curvature
        self._worker = request.worker
        self._outgoing = Outgoing(transport.clock)
        self._outgoing.put(iter([wire.encode(steps_pb2.StreamStepsRequest(open=request))]))
        self._call = transport.stream_steps(iter(self._outgoing))
        # The shorter way for messages, where memory is shared.
        self._control: ControlConnection | None = None
        self._close = weakref.finalize(self, _close, self._outgoing, self._call)
        transport.close_with_me(self)
        try:
            with patience.watching(self._interrupt):
                first = self._next(patience).header
            self.opened: steps_pb2.Opened = first.opened
            if not first.HasField("opened"):
                raise InternalError("The server's first answer on a stream does not say that it is open.")
            if len(set(self.opened.last_tensors)) < len(self.opened.last_tensors) or any(
                tensor >= len(sizes) for tensor in self.opened.last_tensors
            ):
                raise InternalError("The server names parameters of the last step that there are not, or one twice.")
            self._chunk_bytes = _chunk_bytes(self.opened.limits, transport.config)
            self.shared, self.transport_reason = _shared(request, self.opened, sizes, curved=takes_curvature)
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
            self.transport_reason += f"; control takes gRPC, as its socket is not to be reached from here: {error}"
        else:
            weakref.finalize(self, self._control.close)

    def step(
        self, request: steps_pb2.StreamStepsRequest, gradients: Gradients | None, updates: Updates, patience: Patience
    ) -> steps_pb2.Result:
        """Make one step and receive its reply.

        Args:
            request: Its first message, which has its request id and expected step.
            gradients: None to ask for the reply of a step that has been applied.
            updates: Take the reply.
            patience: How long to wait.

        Raises:
            StepRefused: The server's error about this step, after which the stream can be used again.
            UnavailableError: The connection was lost; whether the step was applied is open.
            DeadlineExceededError, StepCancelledError: Patience is at its end; likewise.
        """
        begin = request.begin
        if gradients is not None and not gradients.whole:
            begin.tensors.extend(gradients.indices)
        begin.with_curvature, begin.reply = self._takes_curvature, updates.reply
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
                    raise InternalError("The server's answer to a step has no place in one.")
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
        """Raise InternalError unless a result can be that of the step that was begun; `sent` if with its gradients."""
        if not sent:
            # The last one that had been applied when the stream was opened; a worker's may be older than others' steps.
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
                f"The server's answer is of step {result.step} with the request id {result.request_id[:80]!r}; that is "
                f"not the step that was asked for, {begin.request_id!r}."
            )

    def _refusal(self, begin: steps_pb2.Begin, message: steps_pb2.StepError, *, replied: bool) -> Exception:
        """What to raise for an error about the step that was begun; `replied` if part of its reply was received."""
        error = from_status(message.status)
        if message.request_id not in ("", begin.request_id):
            return InternalError(f"The server's error is about another step: {error}")
        # The reply can be taken away. Anything else comes too late: what is replied to was applied.
        if replied and error.reason not in (_reasons.STEP_TAKEN_OVER, _reasons.INTERNAL):
            return InternalError(f"The server refuses a step in the middle of its reply: {error}")
        return StepRefused(error)

    def _send(
        self, request: steps_pb2.StreamStepsRequest, gradients: Gradients | None
    ) -> Callable[[Patience], wire.ResponseFrame]:
        """Send a step's messages, or let them be sent; gives what its answer is received with."""
        if self.shared is None and gradients is not None:
            messages = gradients.messages(request, self._chunk_bytes, announce=bool(self._worker))
            # Made here, while the sending thread need not be woken for it.
            self._outgoing.put(messages if gradients.grow else chain([next(messages)], messages))
            return self._next
        request.commit.SetInParent()
        message = wire.encode(request)
        if self._control is not None and len(message) <= MAX_PACKET_BYTES:
            self._control.send(message)
            return self._next_packet
        self._outgoing.put(iter([message]))
        return self._next

    def close(self) -> None:
        """End the stream at once. Safe from any thread, and more than once."""
        self._close()
        if self._control is not None:
            self._control.shut()

    def _interrupt(self) -> None:
        """Let whoever waits for a message go on; the stream is of no further use."""
        self._call.cancel()
        if self._control is not None:
            self._control.shut()

    def _next_packet(self, patience: Patience) -> wire.ResponseFrame:
        packet = self._control.receive() if self._control is not None else b""
        if packet:
            try:
                return wire.decode_response(packet)
            except DecodeError as error:
                raise InternalError("The server's answer is no message.") from error
        patience.check()
        raise UnavailableError(f"{self._transport.target} closed the stream.")

    def _next(self, patience: Patience) -> wire.ResponseFrame:
        try:
            return readable(next(self._call))
        except StopIteration:
            error: OptserveError = UnavailableError(f"{self._transport.target} closed the stream.")
        except grpc.RpcError as rpc_error:
            # The call is its own error, and would keep the frames that it came through for as long as it lives.
            error = self._transport.translate(rpc_error.with_traceback(None), patience.timeout_s)
        fault = self._outgoing.fault
        if isinstance(fault, OptserveError):
            raise fault
        if fault is not None:
            raise InternalError(f"A message could not be made: {fault!r}") from fault
        patience.check()
        raise error


class StepRefused(Exception):
    """The server's error about one step, in a stream that lives on.

    Attributes:
        error: What the caller is to see.
    """

    def __init__(self, error: OptserveError) -> None:
        super().__init__(error)
        self.error = error


def _chunk_bytes(limits: steps_pb2.ServerLimits, config: ClientConfig) -> int:
    """The largest payload of one message to a server with those limits, or raise InternalError."""
    preferred = limits.preferred_chunk_bytes or limits.max_chunk_bytes
    if min(preferred, limits.max_chunk_bytes) < MIN_CHUNK_BYTES:
        raise InternalError(
            f"The server takes chunks of at most {limits.max_chunk_bytes} bytes and likes {preferred} best; it should "
            f"take {MIN_CHUNK_BYTES}."
        )
    wanted = config.max_chunk_bytes or preferred
    return min(wanted, limits.max_chunk_bytes, config.max_receive_bytes)


def _shared(
    request: steps_pb2.Open, opened: steps_pb2.Opened, sizes: Sequence[tuple[int, int]], *, curved: bool
) -> tuple[SharedStaging | None, str]:
    """(memory shared with the server, that it is) or (None, why not)."""
    if request.transport != steps_pb2.TRANSPORT_SHARED_MEMORY:
        return None, "shared memory was not asked for"
    if not opened.HasField("shared_memory"):
        return None, "the server does not offer shared memory now: it has no room, or another client has it"
    try:
        return SharedStaging(opened.shared_memory, sizes, curved=curved), "the server is on this host"
    except OSError as error:
        return None, f"the server's shared memory cannot be reached: {error}"


def _close(outgoing: Outgoing, call: grpc.Call) -> None:
    outgoing.end()
    call.cancel()
