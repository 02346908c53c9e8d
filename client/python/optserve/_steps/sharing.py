"""Whether tensors travel through shared memory, see `shared_memory.py`, and how long that is waited for."""

from __future__ import annotations

from collections.abc import Iterator

from optserve._rpc.connection import Transport
from optserve._rpc.deadline import Patience
from optserve._steps.stream import StepStream
from optserve.errors import FeatureUnavailableError, UnavailableError
from optserve.v1 import steps_pb2

_SHARE_AGAIN_AFTER_S = (0.01, 0.02, 0.04, 0.08, 0.16)
"""Pauses between tries to share memory, where this client has just had it, before tensors take the stream."""

_MUST_SHARE_AFTER_S = (*_SHARE_AGAIN_AFTER_S, 0.32, 0.64)
"""Likewise, before an error says that it cannot be shared."""


class Sharing:
    """Of the streams of one object.

    Args:
        connection: Knows of which optimizers this client has shared memory.
        open_request: What the streams are opened with.
        must_share: It is an error if memory is not shared.

    Attributes:
        has_shared: This object has, or may have, shared memory before.
    """

    def __init__(self, connection: Transport, open_request: steps_pb2.Open, *, must_share: bool) -> None:
        self._connection = connection
        self._open_request = open_request
        self._must_share = must_share
        self.has_shared = False

    def pauses(self) -> Iterator[float]:
        """Seconds between tries."""
        return iter(_MUST_SHARE_AFTER_S if self._must_share else _SHARE_AGAIN_AFTER_S)

    def may_begin_soon(self, stream: StepStream) -> bool:
        """Whether memory is not shared for a reason that may pass: a stream that is about to end still has it."""
        if stream.shared is not None or self._open_request.transport != steps_pb2.TRANSPORT_SHARED_MEMORY:
            return False
        if self.has_shared:
            return True
        # An object of this client that was dropped or closed just now may have had it.
        had = self._must_share or self._open_request.name in self._connection.has_shared
        return had and not stream.opened.HasField("shared_memory")

    def check(self, stream: StepStream, patience: Patience) -> None:
        """Take notice of what a stream has, or raise if memory must be shared and is not."""
        if stream.shared is not None:
            self.has_shared = True
            self._connection.has_shared.add(self._open_request.name)
        elif self._must_share:
            # One that was interrupted meanwhile is gone, and its memory with it.
            patience.check()
            message = f"Shared memory cannot be used: {stream.transport_reason}."
            # The server may not have noticed yet that the stream before is gone.
            raise UnavailableError(message) if self.has_shared else FeatureUnavailableError(message)
