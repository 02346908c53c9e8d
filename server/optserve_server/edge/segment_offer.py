"""The segment that a stream offers to its client. The client has to prove in time that it sees the segment."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator

from optserve._common.clock import Lock
from optserve.v1 import steps_pb2
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge import messages
from optserve_server.edge.control_socket import ControlSocket
from optserve_server.numerics.shared_segment import Segment

logger = logging.getLogger(__name__)


class SegmentOffer:
    """A segment for one stream, with a socket for the stream's messages. The segment is as large as a gradient.

    Args:
        segment: The segment.
        parameter_count: Number of parameters that the client knows, the first ones.
        stream_lock: The stream's lock; the caller of `accept` and `end` holds it.
        answer: Answers a message that comes through the socket.
        unshare: Takes the segment back.
        receive_s: Seconds that the client has to prove that it sees the segment.

    Attributes:
        segment: The segment; None once the server has taken it back.
    """

    def __init__(
        self,
        segment: Segment,
        parameter_count: int,
        stream_lock: Lock,
        answer: Callable[[bytes], Generator[bytes]],
        unshare: Callable[[Segment], None],
        receive_s: float,
    ) -> None:
        self.segment: Segment | None = segment
        self._stream_lock = stream_lock
        self._unshare = unshare
        self._receive_s = receive_s
        self._is_proven = False
        self._is_withdrawn = False
        self._withdrawal = threading.Timer(receive_s, self._withdraw)
        self._withdrawal.daemon = True
        try:
            self._withdrawal.start()
        except RuntimeError:
            # The system has no more threads. The stream has no offer yet, so it could not take the segment back.
            unshare(segment)
            raise
        self._control: ControlSocket | None = None
        try:
            self._control = ControlSocket(segment.nonce, answer)
        except OSError as error:
            logger.warning("there is no control socket, so each step takes a round trip over gRPC: %s", error)
        self.message: steps_pb2.SharedMemory = messages.shared_memory(
            segment, self._control.name if self._control else "", parameter_count
        )
        """The message that offers the segment to the client."""

    def accept(self, nonce: bytes) -> Segment | None:
        """The segment for a step that begins; None if the gradients come in messages.

        Args:
            nonce: The bytes that the client has read in the segment, with the first step of the stream; empty if it
                cannot reach the segment.

        Raises:
            OptserveError: INVALID_FIELD for a wrong nonce; STEP_TAKEN_OVER if the offer has ended.
        """
        if self.segment is not None and not self._is_proven:
            self._check(self.segment, nonce)
        elif self._is_withdrawn and nonce:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER,
                f"The client has not proven within {self._receive_s:g} s that it sees the segment, so the segment is "
                "gone; open another stream.",
            )
        return self.segment

    def _check(self, segment: Segment, nonce: bytes) -> None:
        self._is_proven = nonce == segment.nonce
        if self._is_proven:
            self._withdrawal.cancel()
            return
        self.end()
        if nonce:
            raise OptserveError(
                Reason.INVALID_FIELD,
                "This is not the nonce of the segment that the server has offered.",
                field="begin.shared_memory_nonce",
            )

    def _withdraw(self) -> None:
        """End the offer, because the client has not proven in time that it sees the segment."""
        with self._stream_lock:
            if self._is_proven or self.segment is None or (self._control is not None and self._control.proven):
                return
            self._is_withdrawn = True
            self.end()
        self.close_control()

    def end(self) -> None:
        """Take the segment back."""
        self._withdrawal.cancel()
        segment, self.segment = self.segment, None
        if segment is not None:
            self._unshare(segment)

    def close_control(self) -> None:
        """Close the socket. Call it without the stream's lock, which a message on its way may need."""
        if self._control is not None:
            self._control.close()
