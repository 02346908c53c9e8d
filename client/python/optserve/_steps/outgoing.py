"""The queue of messages that one stream has to send."""

from __future__ import annotations

from collections.abc import Iterator

from optserve._common import wire
from optserve._common.clock import Clock
from optserve.v1 import steps_pb2


class Outgoing:
    """An iterator of messages for gRPC's sending thread: step after step. Each message is made when gRPC asks for it.

    It has no reference to the stream, so that an unused stream can be collected and closed.
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
        """Do not send the rest of the present step."""
        self._stop_step = True

    def end(self) -> None:
        """Send no more messages."""
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
            # An exception in this thread would look to the server like a half-close (grpc#33038). It is kept for the
            # caller instead.
            except Exception as error:  # noqa: BLE001
                self.fault = error
                return
