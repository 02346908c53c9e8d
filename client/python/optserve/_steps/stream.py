"""One StreamSteps call from the client's side: sends the frames of a step, puts the reply into arrays."""

from __future__ import annotations

import queue
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from optserve import _reasons
from optserve._common import half_floats, wire
from optserve._common.control import MAX_PACKET_BYTES, ControlConnection
from optserve._rpc.connection import Transport, readable
from optserve._rpc.deadline import Patience
from optserve._steps.error_feedback import Attempt, Rounding
from optserve._steps.shared_memory import CURVATURE, GRADIENT, Arrival, Operand, SharedStaging
from optserve._steps.updates import Updates
from optserve.config import ClientConfig
from optserve.errors import InternalError, OptserveError, UnavailableError, from_status
from optserve.v1 import steps_pb2

ANNOUNCED_BYTES = 1 << 16
"""Steps of workers from this size on are announced."""

MIN_CHUNK_BYTES = 1024
"""The contract has no chunk limits below this."""


class Gradients:
    """The gradients of one step as it travels.

    Args:
        indices: The parameters that take part, ascending.
        arrays: Their gradients, C-contiguous, little-endian.
        whole: Whether these are all parameters of the optimizer.
        wire: Dtype of the payload; None for each array's own.
        curvature: The diagonals of the Hessian, like `arrays`, for the methods that take them.

    Attributes:
        rounding: Adds to the gradients what rounding has left out of those before, where that is wanted.
    """

    grow = False
    """Whether some may have to be waited for."""

    def __init__(
        self,
        indices: Sequence[int],
        arrays: Sequence[np.ndarray],
        *,
        whole: bool,
        wire: np.dtype | None = None,
        curvature: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.indices = indices
        self._curvature = curvature
        self.arrays = arrays
        self.whole = whole
        self.rounding: Rounding | None = None
        self._wire = wire

    def messages(
        self, request: steps_pb2.StreamStepsRequest, max_chunk_bytes: int, *, announce: bool
    ) -> Iterator[bytes]:
        """`request`, which has begin, then chunks and commit; a step that fits into one chunk is one message.

        Where many workers share a server, begin is better sent ahead: the server reads on when it is its turn, and what
        it has not read it need not keep.
        """
        pending: list[memoryview] = []
        if announce and sum(array.nbytes for array in self.arrays) >= ANNOUNCED_BYTES:
            yield wire.encode(request)
            request = steps_pb2.StreamStepsRequest()
        attempt = self.rounding.attempt() if self.rounding else None
        for chunk in self._chunks(max_chunk_bytes, attempt):
            if pending:
                yield wire.encode(request, *pending)
                request, pending = steps_pb2.StreamStepsRequest(), []
            if chunk is None:
                continue
            header = request.chunk
            header.operand, header.tensor, header.offset, pending = chunk
        if attempt is not None:
            attempt.finish()
        request.commit.SetInParent()
        yield wire.encode(request, *pending)

    def _chunks(
        self, max_chunk_bytes: int, attempt: Attempt | None
    ) -> Iterator[tuple[Operand, int, int, list[memoryview]] | None]:
        """(operand, tensor, offset, bytes) of at most `max_chunk_bytes`; small neighbours share a chunk.

        None where the next one may be long in coming, and what there is should be sent.
        """
        parts: list[memoryview] = []
        operand, index, tensor, offset, size = GRADIENT, 0, 0, 0, 0
        for arrival in self.arrivals():
            # A chunk runs on into the next tensor of the step, and into no other.
            if parts and (arrival is None or arrival[:2] != (operand, self._after(index))):
                yield operand, tensor, offset, parts
                parts, size = [], 0
            if arrival is None:
                yield None
                continue
            operand, index, array = arrival
            item, begin = (self._wire or array.dtype).itemsize, 0
            while begin < array.size:
                # Chunks end between elements.
                room = (max_chunk_bytes - size) // item
                if room == 0:
                    yield operand, tensor, offset, parts
                    parts, size = [], 0
                    continue
                if not parts:
                    tensor, offset = index, begin * item
                elements = array.reshape(-1)[begin : begin + room] if begin or room < array.size else array
                if self._wire is None or self._wire == array.dtype:
                    part = elements.data.cast("B")
                elif attempt is not None and operand == GRADIENT:
                    part = self._rounded(attempt, index, array, begin, elements.size)
                else:
                    part = self._on_the_wire(elements)
                parts.append(part)
                begin, size = begin + room, size + len(part)
        if parts:
            yield operand, tensor, offset, parts

    @property
    def with_curvature(self) -> bool:
        """Whether there is a diagonal of the Hessian as well."""
        return self._curvature is not None

    def arrivals(self) -> Iterator[Arrival | None]:
        """Each parameter's gradient, then each one's curvature; None before one that is waited for."""
        for index, array in zip(self.indices, self.arrays, strict=True):
            yield GRADIENT, index, array
        for index, array in zip(self.indices, self._curvature or (), strict=False):
            yield CURVATURE, index, array

    def _after(self, index: int) -> int | None:
        """The parameter after that one in the step."""
        position = bisect_right(self.indices, index)
        return self.indices[position] if position < len(self.indices) else None

    def _on_the_wire(self, elements: np.ndarray) -> memoryview:
        converted = np.empty(elements.size, self._wire)
        half_floats.convert(elements.reshape(-1), converted)
        return converted.data.cast("B")

    def _rounded(self, attempt: Attempt, index: int, array: np.ndarray, begin: int, size: int) -> memoryview:
        converted = np.empty(size, self._wire)
        attempt.convert(index, array.reshape(-1), begin, converted)
        return converted.data.cast("B")


class _Outgoing:
    """What gRPC's sending thread iterates: step after step, each message made when the wire is ready for it.

    It knows nothing of the stream, so that a stream that nobody uses any more can be collected and closed.
    """

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()
        self._stop_step = False
        self.fault: Exception | None = None

    def put(self, messages: Iterator[bytes]) -> None:
        """Send the messages of a step."""
        self._stop_step = False
        self._steps.put(messages)

    def stop_step(self) -> None:
        """What has not been sent of the present step need not be."""
        self._stop_step = True

    def end(self) -> None:
        """Send nothing any more."""
        self._stop_step = True
        self._steps.put(None)

    def __iter__(self) -> Iterator[bytes]:
        while (messages := self._steps.get()) is not None:
            try:
                for message in messages:
                    yield message
                    if self._stop_step:
                        yield wire.encode(steps_pb2.StreamStepsRequest(abort=steps_pb2.Abort()))
                        break
            # An exception in here looks to the server like a half-close (grpc#33038), so it is kept for the caller.
            except Exception as error:  # noqa: BLE001
                self.fault = error
                return


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
        self._outgoing = _Outgoing()
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


def _close(outgoing: _Outgoing, call: grpc.Call) -> None:
    outgoing.end()
    call.cancel()
