"""The streams of one optimizer object: opened when a step needs one, and compared with the known state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from optserve import _reasons
from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve._steps.lives import Life
from optserve._steps.sharing import Sharing
from optserve._steps.stream import StepStream
from optserve.errors import NotFoundError, OptserveError, StateReplacedError, StepsLostError, UnavailableError
from optserve.v1 import steps_pb2


@dataclass
class KnownState:
    """The state of an optimizer, as far as a client knows it.

    Attributes:
        step: Steps that the server has applied.
        lineage: The state's lineage.
        create_time: When the optimizer was created; it differs between optimizers of one name.
    """

    step: int
    lineage: str
    create_time: Timestamp

    def check(self, opened: steps_pb2.Opened, name: str) -> None:
        """Raise unless the server has the state that this client knows."""
        if opened.HasField("create_time") and opened.create_time != self.create_time:
            raise StateReplacedError(
                f"{name} was deleted and created anew; it is at step {opened.step}. Get it anew with "
                "client.optimizer(), or call refresh() to go on if its parameters are the same.",
                reason=_reasons.STATE_REPLACED,
            )
        if opened.step < self.step:
            raise StepsLostError(
                f"This client has seen step {self.step} of {name}; the server is at step {opened.step}. Its state was "
                "not durable, or somebody has rolled it back. Call refresh() to go on from there."
            )
        if opened.lineage != self.lineage:
            raise StateReplacedError(
                f"The state of {name} was replaced by a restore or an import; it is at step {opened.step}. Call "
                "refresh() to go on with it."
            )


class Streams:
    """The streams of one optimizer object; one is open at a time.

    Args:
        connection: To the server.
        open_request: The first message of each stream.
        known: The state of the optimizer, as far as this client knows it.
        sizes: (bytes, bytes of an element) of each parameter.
        must_share: Whether it is an error if memory is not shared.
        takes_curvature: Whether the method takes the diagonal of the Hessian.

    Attributes:
        current: The open stream; None if there is none.
        life: The life of the worker, or that of a client that is no worker.
        name: The optimizer's name, quoted, for messages.
    """

    def __init__(
        self,
        connection: Connection,
        open_request: steps_pb2.Open,
        known: KnownState,
        sizes: Sequence[tuple[int, int]],
        *,
        must_share: bool = False,
        takes_curvature: bool = False,
    ) -> None:
        self.open_request = open_request
        self.known = known
        self.life = Life(open_request.worker)
        self.current: StepStream | None = None
        self._connection = connection
        self._sharing = Sharing(connection, open_request, must_share=must_share)
        self._sizes = sizes
        self._takes_curvature = takes_curvature
        self.name = repr(open_request.name.removeprefix("optimizers/"))

    def get(self, patience: Patience) -> StepStream:
        """The open stream, or a new one.

        Raises:
            OptserveError: No stream could be opened, or the server has another state than the known one.
        """
        if self.current is None:
            pauses = self._sharing.pauses()
            while self._sharing.should_retry(stream := self._open(patience)):
                # The server may not know yet that the previous stream has ended.
                pause_s = next(pauses, None)
                if pause_s is None:
                    break
                stream.close()
                patience.pause(pause_s, UnavailableError(f"Shared memory cannot be used: {stream.transport_reason}."))
            try:
                self._sharing.check(stream, patience)
            except OptserveError:
                stream.close()
                raise
            self.current = stream
        return self.current

    def _open(self, patience: Patience) -> StepStream:
        try:
            stream = StepStream(
                self._connection, self.open_request, patience, self._sizes, takes_curvature=self._takes_curvature
            )
        except NotFoundError as error:
            if self.known.step == 0:
                raise
            raise StepsLostError(
                f"This client has seen step {self.known.step} of {self.name}, but the server has no such optimizer; a "
                "new one begins at step 0. The server has lost its state, or somebody has deleted the optimizer."
            ) from error
        except OptserveError as error:
            # The server may have opened the stream all the same, and may still share memory with it.
            self._sharing.has_shared = True
            self.life.note_error(error)
            raise
        try:
            self.known.check(stream.opened, self.name)
            self.life.check_last(stream.opened.last_request_id)
        except OptserveError:
            stream.close()
            raise
        return stream

    def renew(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Know other parameters from now on, on another stream; see `sizes`."""
        self.close()
        self._sizes = sizes
        self.open_request.parameter_count = len(sizes)

    def begin(self, request_id: str, at_step: int | None) -> steps_pb2.StreamStepsRequest:
        """The first message of a step."""
        request = steps_pb2.StreamStepsRequest()
        begin = request.begin
        begin.request_id = request_id
        if not self.open_request.worker:
            begin.expected_step = self.known.step
        elif at_step is not None:
            begin.parameters_step = at_step
        return request

    def close(self) -> None:
        """Close the open stream; the next step opens another."""
        stream, self.current = self.current, None
        if stream is not None:
            stream.close()
