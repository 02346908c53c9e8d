"""Whether a stream shares memory with the server, and how often to try; `shared_memory.py` has the memory itself."""

from __future__ import annotations

from collections.abc import Iterator

from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve._steps.stream import StepStream
from optserve.errors import FeatureUnavailableError, UnavailableError
from optserve.v1 import steps_pb2

_RETRY_PAUSES_S = (0.01, 0.02, 0.04, 0.08, 0.16)
"""Seconds between tries to share memory, where this client has just had it. Then tensors travel in messages."""

_REQUIRED_RETRY_PAUSES_S = (*_RETRY_PAUSES_S, 0.32, 0.64)
"""The same with `transport="shm"`. Then an error says that memory cannot be shared."""


class Sharing:
    """Decides whether the streams of one object may go on without shared memory.

    Args:
        connection: Has the names of optimizers whose memory this client has shared.
        open_request: The first message of each stream.
        must_share: Whether it is an error if memory is not shared.

    Attributes:
        has_shared: Whether this object has, or may have, shared memory before.
    """

    def __init__(self, connection: Connection, open_request: steps_pb2.Open, *, must_share: bool) -> None:
        self._connection = connection
        self._open_request = open_request
        self._must_share = must_share
        self.has_shared = False

    def pauses(self) -> Iterator[float]:
        """Seconds between tries."""
        return iter(_REQUIRED_RETRY_PAUSES_S if self._must_share else _RETRY_PAUSES_S)

    def should_retry(self, stream: StepStream) -> bool:
        """Whether to open another stream soon: the server may still hold the segment for one that is about to end."""
        if stream.shared is not None or self._open_request.transport != steps_pb2.TRANSPORT_SHARED_MEMORY:
            return False
        if self.has_shared:
            return True
        # An object of this client that was dropped or closed just now may have had it.
        had = self._must_share or self._open_request.name in self._connection.has_shared
        return had and not stream.opened.HasField("shared_memory")

    def check(self, stream: StepStream, patience: Patience) -> None:
        """Record whether the stream shares memory; raise if it must and does not."""
        if stream.shared is not None:
            self.has_shared = True
            self._connection.has_shared.add(self._open_request.name)
        elif self._must_share:
            # A stream that was interrupted meanwhile has no memory any more; then the interruption is the error.
            patience.check()
            message = f"Shared memory cannot be used: {stream.transport_reason}."
            # The server may not have noticed yet that the stream before is gone.
            raise UnavailableError(message) if self.has_shared else FeatureUnavailableError(message)
