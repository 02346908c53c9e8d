"""The stream that the steps of one object take: opened when it is needed, and compared with what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from optserve import _reasons
from optserve._rpc.connection import Transport
from optserve._rpc.deadline import Patience
from optserve._steps.lives import Life
from optserve._steps.sharing import Sharing
from optserve._steps.stream import StepStream
from optserve.errors import NotFoundError, OptserveError, StateReplacedError, StepsLostError, UnavailableError
from optserve.v1 import steps_pb2


@dataclass
class Known:
    """What a client knows of an optimizer on the server.

    Attributes:
        step: Steps that the server has applied.
        lineage: Says which state these steps are of.
        create_time: Says of which optimizer of that name.
    """

    step: int
    lineage: str
    create_time: Timestamp

    def check(self, opened: steps_pb2.Opened, name: str) -> None:
        """Raise unless the server has the state that this client knows."""
        if opened.HasField("create_time") and opened.create_time != self.create_time:
            raise StateReplacedError(
                f"{name} has been deleted and made anew since this client last looked; it is at step "
                f"{opened.step}. Get it anew from the client; or refresh() and go on, if its parameters are the same.",
                reason=_reasons.STATE_REPLACED,
            )
        if opened.step < self.step:
            raise StepsLostError(
                f"This client has seen step {self.step} of {name}; the server is back at step "
                f"{opened.step}. Its state was not durable, or it was rolled back. Call refresh() to go on from there."
            )
        if opened.lineage != self.lineage:
            raise StateReplacedError(
                f"The state of {name} is another one than this client knew: restored, imported, or that of a new "
                f"optimizer; it is at step {opened.step}. Call refresh() to go on with it."
            )


class Streams:
    """Those of one object, one at a time.

    Args:
        connection: To the server.
        open_request: What each is opened with.
        known: What is known of the optimizer.
        sizes: (bytes, bytes of an element) of each parameter.
        must_share: It is an error if memory is not shared.
        takes_curvature: Whether the method takes the diagonal of the Hessian.

    Attributes:
        now: The one that is open.
        life: That of the worker, if the object is one.
        name: The optimizer's, for messages.
    """

    def __init__(
        self,
        connection: Transport,
        open_request: steps_pb2.Open,
        known: Known,
        sizes: Sequence[tuple[int, int]],
        *,
        must_share: bool = False,
        takes_curvature: bool = False,
    ) -> None:
        self.open_request = open_request
        self.known = known
        self.life = Life(open_request.worker)
        self.now: StepStream | None = None
        self._connection = connection
        self._sharing = Sharing(connection, open_request, must_share=must_share)
        self._sizes = sizes
        self._takes_curvature = takes_curvature
        self.name = repr(open_request.name.removeprefix("optimizers/"))

    def get(self, patience: Patience) -> StepStream:
        """The stream of the next step, opened if it is not open.

        Raises:
            OptserveError: It could not be opened, or leads to another state than is known.
        """
        if self.now is None:
            pauses = self._sharing.pauses()
            while self._sharing.may_begin_soon(stream := self._open(patience)):
                # The server may not have noticed yet that the stream before is gone.
                pause_s = next(pauses, None)
                if pause_s is None:
                    break
                stream.close()
                patience.pause(pause_s, UnavailableError(f"Memory is not shared again: {stream.transport_reason}."))
            try:
                self._sharing.check(stream, patience)
            except OptserveError:
                stream.close()
                raise
            self.now = stream
        return self.now

    def _open(self, patience: Patience) -> StepStream:
        try:
            stream = StepStream(
                self._connection, self.open_request, patience, self._sizes, takes_curvature=self._takes_curvature
            )
        except NotFoundError as error:
            if self.known.step == 0:
                raise
            raise StepsLostError(
                f"This client has seen step {self.known.step} of {self.name}; the server has no such optimizer "
                "any more, and would begin at step 0. It has lost its state, or somebody has deleted it."
            ) from error
        except OptserveError as error:
            # Interrupted while it was opened: the server may share memory with a stream that is no longer there.
            self._sharing.has_shared = True
            self.life.note(error)
            raise
        try:
            self.known.check(stream.opened, self.name)
            self.life.check_last(stream.opened.last_request_id)
        except OptserveError:
            stream.close()
            raise
        return stream

    def close(self) -> None:
        """Close the one that is open; the next step opens another."""
        stream, self.now = self.now, None
        if stream is not None:
            stream.close()
