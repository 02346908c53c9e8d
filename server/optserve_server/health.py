"""The standard health service, grpc.health.v1. Watchers occupy no threads.

grpcio-health-checking's own servicer sends to watchers while it holds a lock that gRPC's only event thread takes when a
watcher goes away: if the two meet, the whole server stands still. Here nothing is sent under a lock that the event
thread wants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Response = health_pb2.HealthCheckResponse
Status = health_pb2.HealthCheckResponse.ServingStatus.ValueType


@dataclass(eq=False)
class _Watcher:
    """One Watch call. Its lock keeps what it is sent in order; the event thread never takes it."""

    service: str
    send: Callable[[Response | None], object]
    order: threading.Lock = field(default_factory=threading.Lock)


class Health(health_pb2_grpc.HealthServicer):
    """Says whether each of some services is serving.

    Args:
        services: Their names; the empty one stands for the server as a whole.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._status: dict[str, Status] = dict.fromkeys(services, Response.NOT_SERVING)
        self._watchers: set[_Watcher] = set()

    def set(self, status: Status) -> None:
        """Give all services a status, and tell their watchers."""
        with self._lock:
            self._status = dict.fromkeys(self._status, status)
            watchers = list(self._watchers)
        for watcher in watchers:
            self._tell(watcher)

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Response:  # noqa: N802
        """The status of a service, or NOT_FOUND."""
        with self._lock:
            status = self._status.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return Response()
        return Response(status=status)

    def Watch(  # noqa: N802 - pyright: ignore[reportIncompatibleMethodOverride]
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,
        send_response_callback: Callable[[Response | None], object],
    ) -> None:
        """Send the status of a service now and whenever it changes."""
        watcher = _Watcher(request.service, send_response_callback)
        with self._lock:
            self._watchers.add(watcher)
        if not context.add_callback(lambda: self._forget(watcher)):
            self._forget(watcher)
        self._tell(watcher)

    # That is how gRPC knows that a method sends by itself and gives its thread back.
    Watch.experimental_non_blocking = True  # pyright: ignore[reportFunctionMemberAccess]
    Watch.experimental_thread_pool = None  # pyright: ignore[reportFunctionMemberAccess]

    def _tell(self, watcher: _Watcher) -> None:
        with watcher.order:
            with self._lock:
                status = self._status.get(watcher.service, Response.SERVICE_UNKNOWN)
            watcher.send(Response(status=status))

    def _forget(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)
        watcher.send(None)
