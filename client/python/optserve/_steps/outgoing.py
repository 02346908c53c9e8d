"""The messages of one stream that are to be sent, made when gRPC is ready for them."""

from __future__ import annotations

from collections.abc import Iterator

from optserve._common import wire
from optserve._common.clock import Clock
from optserve.v1 import steps_pb2


class Outgoing:
    """What gRPC's sending thread iterates: step after step, each message made when the wire is ready for it.

    It knows nothing of the stream, so that a stream that nobody uses any more can be collected and closed.
    """

    def __init__(self, clock: Clock) -> None:
        # Iterators of bytes; None at the end.
        self._steps = clock.queue()
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
