"""One StreamSteps call: turns frames into calls of the transaction, and its results into messages.

closed ──open──> idle ──begin──> staging ──commit──> idle
                  ^                 │ error: answered once
                  └─commit, abort── failed: the rest of that step is ignored
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from enum import Enum, auto

import numpy as np
from google.rpc import status_pb2

from optserve._common.clock import SYSTEM, Clock
from optserve._common.wire import RequestFrame, decode_request, encode
from optserve.v1 import service_pb2, steps_pb2
from optserve_server.domain.config import UNASKED_CHUNK_BYTES, ServerConfig
from optserve_server.domain.errors import OptserveError, Reason, renaming_fields
from optserve_server.edge import features, messages
from optserve_server.edge.gate.drain_gate import DrainGate
from optserve_server.edge.gate.places import NEXT_MESSAGE, current
from optserve_server.edge.gate.upload_limiter import UploadLimiter
from optserve_server.edge.results import reply_message, set_result
from optserve_server.edge.segment_offer import SegmentOffer
from optserve_server.edge.settings_messages import step_options
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import Step, StepRequest
from optserve_server.numerics.layout import ALL, Selection

_numbers = itertools.count(1)
"""Of streams, as they are opened."""

_BEGIN_FIELDS = {
    name: f"begin.{name}" for name in ("request_id", "tensors", "reply", "worker", "parameters_step", "etag")
}
_CHUNK_FIELDS = {"tensor": "chunk.tensor", "offset": "chunk.offset", "operand": "chunk.operand"}


class _Phase(Enum):
    CLOSED = auto()
    IDLE = auto()
    STAGING = auto()
    FAILED = auto()


# Python finds a member in its Enum in 80 ns, and a small step has a dozen to look at.
_CLOSED, _IDLE, _STAGING, _FAILED = _Phase


class StepStream:
    """The server's side of one stream.

    Args:
        optimizers: Where `open` looks its optimizer up.
        drain_gate: Asked before each step.
        upload_limiter: Passed by the steps of workers that announce them.
        config: For the limits.
        to_status: Turns any exception of a step into the status that the client gets.
        clock: The time.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        drain_gate: DrainGate,
        upload_limiter: UploadLimiter,
        config: ServerConfig,
        to_status: Callable[[Exception], status_pb2.Status],
        clock: Clock = SYSTEM,
    ) -> None:
        self._clock = clock
        self._optimizers = optimizers
        self._drain_gate = drain_gate
        self._upload_limiter = upload_limiter
        self._config = config
        self._to_status = to_status
        self._phase = _CLOSED
        self._optimizer: Optimizer
        self._takes_curvature = False
        self._wire: np.dtype | None = None
        self._lineage = ""
        # Messages come through the stream, or through its control socket.
        self._lock = clock.lock()
        self._place = current()
        self._offer: SegmentOffer | None = None
        self._reply_chunk_bytes = config.sent_chunk_bytes
        self._step: Step | None = None
        self._request_id = ""
        self._worker, self._life = "", 0
        self._number = 0
        self._parameter_count = 0
        self._client_gone = False

    def interrupt(self) -> None:
        """The client is gone: a commit that waits for other workers need not wait any more.

        Called in the thread that serves all calls, which must not wait for a lock.
        """
        self._client_gone = True
        step = self._step
        if step is not None and self._worker:
            step.abandoned = True
            self._clock.thread(self._optimizer.steps.workers.wake, "wake").start()

    def handle(self, raw: bytes) -> Iterator[bytes]:
        """Carry out the parts of one message, in the order of their numbers.

        Raises:
            OptserveError: What ends the stream: a failed `open`, or none; bytes that are no message.
        """
        with self._lock:
            frame = messages.decode(decode_request, raw)
            header = frame.header
            if header.HasField("open"):
                yield encode(steps_pb2.StreamStepsResponse(opened=self._open(header.open)))
            elif self._phase is _CLOSED:
                raise OptserveError(Reason.NOT_OPEN, "The first message of a stream must have `open`.", field="open")
            commits = header.HasField("commit")
            try:
                self._take(frame, commits=commits)
                if commits:
                    yield from self._commit()
                    self._end(_IDLE)
            except GeneratorExit:
                # Nobody takes the answer any more; a step that was committed has ended nevertheless.
                if commits:
                    self._end(_IDLE)
                raise
            # Every failure is answered in the stream, which lives on.
            except Exception as error:  # noqa: BLE001
                yield self._fail(error)
                if commits:
                    self._phase = _IDLE
            if header.HasField("abort"):
                self._end(_IDLE)

    def _take(self, frame: RequestFrame, *, commits: bool) -> None:
        """Begin a step and stage a chunk, where the message has them."""
        header = frame.header
        # What errors from below call their fields, and the paths that these have in this message.
        paths = _BEGIN_FIELDS
        try:
            has_chunk = header.HasField("chunk")
            if header.HasField("begin"):
                self._begin(header.begin, announced=not (has_chunk or commits))
            paths = _CHUNK_FIELDS
            if has_chunk:
                self._chunk(header.chunk, frame.data or b"")
            elif header.data and self._phase is not _FAILED:
                raise OptserveError(Reason.INVALID_FIELD, "`data` came without `chunk`.", field="chunk")
        except OptserveError as error:
            error.field = paths.get(error.field, error.field)
            raise

    def close(self) -> None:
        """Discard what is under way."""
        if self._offer is not None:
            # First, so that nothing new comes from there.
            self._offer.close_control()
        with self._lock:
            self._end(_CLOSED)
            if self._offer is not None:
                self._offer.end()

    def _answer_packet(self, packet: bytes) -> Generator[bytes]:
        """`handle` for a message that came through the control socket; ConnectionError where the stream would end."""
        if self._place is not None:
            # The call itself sees nothing of it, and would give way to others as one whose client is silent.
            self._place.resume()
        try:
            yield from self.handle(packet)
        except OptserveError as error:
            failure = steps_pb2.StepError(status=self._to_status(error))
            yield encode(steps_pb2.StreamStepsResponse(error=failure))
            raise ConnectionError("the stream cannot go on") from error
        finally:
            if self._place is not None:
                self._place.wait(NEXT_MESSAGE)

    def _open(self, request: steps_pb2.Open) -> steps_pb2.Opened:
        if self._phase is not _CLOSED:
            raise OptserveError(Reason.ALREADY_OPEN, "This stream is open already.", field="open")
        messages.check_known(request, "transport", "open")
        if request.transport == steps_pb2.TRANSPORT_SHARED_MEMORY:
            features.check(service_pb2.FEATURE_SHARED_MEMORY, "open.transport")
        # Of many streams together the fewest messages cost least; of one, whose ends take turns, smaller ones do.
        preferred = self._config.max_chunk_bytes if request.worker else self._config.preferred_chunk_bytes
        wanted = request.max_chunk_bytes or min(preferred, UNASKED_CHUNK_BYTES)
        if wanted < 1024:
            raise OptserveError(
                Reason.INVALID_FIELD, "max_chunk_bytes must be at least 1024.", field="open.max_chunk_bytes"
            )
        optimizer = self._optimizers.get(messages.optimizer_id(request.name, "open.name"))
        optimizer.check_etag(request.etag)
        self._wire = messages.wire_dtype(request.wire_type, "open.wire_type")
        self._reply_chunk_bytes = min(wanted, self._config.max_chunk_bytes)
        self._optimizer, self._phase = optimizer, _IDLE
        # Before the segment is made, which may have room for parameters that are added meanwhile.
        self._parameter_count = request.parameter_count or len(optimizer.layout.parameters)
        self._takes_curvature = optimizer.rule.takes_curvature
        self._number = next(_numbers)
        with renaming_fields({"worker": "open.worker"}):
            messages.check_life(request.life, "open.life")
            step, last_request_id, last, self._lineage = optimizer.steps.last(
                request.worker, self._number, request.life
            )
        self._worker, self._life = request.worker, request.life
        if request.transport == steps_pb2.TRANSPORT_SHARED_MEMORY and self._wire is None:
            segment = self._optimizers.share(optimizer)
            if segment is not None:
                self._offer = SegmentOffer(
                    segment,
                    self._parameter_count,
                    self._lock,
                    self._answer_packet,
                    optimizer.steps.unshare,
                    self._config.receive_s,
                )
        is_whole = self._parameter_count >= len(optimizer.layout.parameters)
        return steps_pb2.Opened(
            shared_memory=self._offer.message if self._offer else None,
            step=step,
            last_request_id=last_request_id,
            last_tensors=(last if is_whole else last.among_first(self._parameter_count)).listed,
            limits=messages.limits(self._config, preferred),
            etag=optimizer.etag,
            lineage=self._lineage,
            create_time=messages.timestamp(optimizer.create_time.timestamp()),
            step_settings=True,
        )

    def _begin(self, request: steps_pb2.Begin, *, announced: bool) -> None:
        interrupted = self._phase is _STAGING
        if self._phase is not _IDLE:
            self._end(_IDLE)
        self._request_id = request.request_id
        if interrupted:
            raise OptserveError(
                Reason.STEP_NOT_ENDED, "A step was begun inside another; both are discarded.", field="begin"
            )
        if request.with_curvature != self._takes_curvature:
            needs = "needs" if self._takes_curvature else "takes no"
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{self._optimizer.rule.name} {needs} curvature, diag(H).",
                field="begin.with_curvature",
            )
        reply = messages.reply(request.reply, "begin.reply")
        segment = self._offer.accept(request.shared_memory_nonce) if self._offer is not None else None
        self._optimizers.check_is_same(self._optimizer)
        tensors = request.tensors
        if tensors:
            messages.check_tensor_count(tensors, self._optimizer.layout, "begin.tensors")
        expected = request.expected_step if request.HasField("expected_step") else None
        self._drain_gate.enter()
        try:
            self._step = self._optimizer.steps.begin(
                StepRequest(
                    self._request_id,
                    expected,
                    Selection(tuple(tensors)) if tensors else ALL,
                    self._wire,
                    self._lineage,
                    reply,
                    segment,
                    self._worker,
                    request.parameters_step if request.HasField("parameters_step") else None,
                    self._number,
                    self._life,
                    options=step_options(request, self._optimizer),
                    parameter_count=self._parameter_count,
                )
            )
        finally:
            if self._step is None:
                self._drain_gate.leave()
        if self._client_gone and self._step is not None:
            # Before there was a step to be given up.
            self._step.abandoned = True
        self._phase = _STAGING
        if announced and self._worker:
            # With its buffer: one that waited for room in here would keep others out who have theirs.
            self._upload_limiter.enter(self)

    def _chunk(self, chunk: steps_pb2.Chunk, data: bytes | memoryview) -> None:
        if self._phase is _FAILED:
            return
        if self._step is None:
            raise OptserveError(Reason.NO_STEP, "A chunk came outside a step; begin one first.", field="chunk")
        if self._step.segment is not None:
            raise OptserveError(
                Reason.INVALID_FIELD, "A chunk came for a step whose gradients are in shared memory.", field="chunk"
            )
        operand = messages.operand(chunk.operand, "chunk.operand")
        if len(data) > self._config.max_chunk_bytes:
            raise OptserveError(
                Reason.MESSAGE_TOO_LARGE,
                f"The chunk has {len(data)} bytes; this server accepts {self._config.max_chunk_bytes}.",
                field="data",
                limit_bytes=self._config.max_chunk_bytes,
                actual_bytes=len(data),
            )
        self._step.stage(chunk.tensor, chunk.offset, data, operand)
        if self._worker:
            self._upload_limiter.record_progress(self, len(data))

    def _commit(self) -> Iterable[bytes]:
        """Apply the step; gives the messages that answer it."""
        if self._phase is _FAILED:
            return ()
        if self._step is None:
            raise OptserveError(Reason.NO_STEP, "A commit came outside a step; begin one first.", field="commit")
        if self._worker:
            consistency = self._optimizer.settings.consistency
            if consistency is not None and consistency.waits:
                # Those that it may wait for have to come in first.
                self._upload_limiter.leave(self)
        outcome = self._step.commit()
        # The last chunk and the result share a message, so a small step is answered by one.
        last = steps_pb2.StreamStepsResponse()
        set_result(last.result, outcome)
        if self._step.segment is not None or not self._step.reply_bytes:
            return (encode(last),)
        return self._step.reply(self._reply_chunk_bytes, lambda piece: reply_message(piece, last))

    def _fail(self, error: Exception) -> bytes:
        request_id = self._request_id
        # First, as the disk may take its time.
        self._end(_FAILED)
        if isinstance(error, OptserveError):
            if error.field == "etag" or error.field.startswith("settings"):
                error.field = f"begin.{error.field}"
            error = self._optimizers.certain(error)
        failure = steps_pb2.StepError(request_id=request_id, status=self._to_status(error))
        return encode(steps_pb2.StreamStepsResponse(error=failure))

    def _end(self, phase: _Phase) -> None:
        step, self._step, self._phase = self._step, None, phase
        self._request_id = ""
        if self._worker:
            self._upload_limiter.leave(self)
        if step is not None:
            try:
                step.close()
            finally:
                self._drain_gate.leave()
