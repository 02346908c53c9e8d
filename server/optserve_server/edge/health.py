"""The standard health service, grpc.health.v1.

Each watcher has a thread of its own, and their number is limited. A watcher that does not take its messages delays
nobody else, and a change of the status waits for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Response = health_pb2.HealthCheckResponse
Status = health_pb2.HealthCheckResponse.ServingStatus.ValueType


class Health(health_pb2_grpc.HealthServicer):
    """Answers whether services are serving.

    Args:
        services: Names of the services; the empty name stands for the server as a whole.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._changed = threading.Condition()
        self._status: dict[str, Status] = dict.fromkeys(services, Response.NOT_SERVING)
        self._closed = False

    def set(self, status: Status) -> None:
        """Set the status of all services, and send it to their watchers."""
        with self._changed:
            self._status = dict.fromkeys(self._status, status)
            self._changed.notify_all()

    def close(self) -> None:
        """Set all services to NOT_SERVING, send that to the watchers, and end their streams."""
        with self._changed:
            self._status = dict.fromkeys(self._status, Response.NOT_SERVING)
            self._closed = True
            self._changed.notify_all()

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Response:  # noqa: N802
        """The status of a service, or NOT_FOUND."""
        status = self._status.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return Response()
        return Response(status=status)

    def Watch(  # noqa: N802 - pyright: ignore[reportIncompatibleMethodOverride]
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[Response]:
        """The present status of a service, and each change of it."""
        if not context.add_callback(self._wake):
            return
        last: Status | None = None
        while context.is_active():
            with self._changed:
                while context.is_active() and not self._closed and self._status_of(request) == last:
                    self._changed.wait()
                status, closed = self._status_of(request), self._closed
            if status != last:
                last = status
                yield Response(status=status)
            if closed:
                return

    def _status_of(self, request: health_pb2.HealthCheckRequest) -> Status:
        return self._status.get(request.service, Response.SERVICE_UNKNOWN)

    def _wake(self) -> None:
        """A watcher is gone. Called in gRPC's event thread, which may take this lock: nobody waits while holding it."""
        with self._changed:
            self._changed.notify_all()
