"""The edge around every call: errors become statuses, and streams are counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from optserve_server.errors import OptserveError, Reason
from optserve_server.status import to_status

logger = logging.getLogger(__name__)

Handler = grpc.RpcMethodHandler
Continuation = Callable[[grpc.HandlerCallDetails], Handler | None]


class ErrorInterceptor(grpc.ServerInterceptor):
    """Turns what a method raises into a google.rpc.Status."""

    def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Wrap the method of one call."""
        return _wrap(continuation(handler_call_details), self._unary, self._stream)

    @staticmethod
    def _unary(method: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        # The one translator: whatever it is, it becomes a status.
        except Exception as error:  # noqa: BLE001
            return _abort(error, context)

    @staticmethod
    def _stream(method: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request, context)
        except Exception as error:  # noqa: BLE001
            _abort(error, context)


class StreamLimiter(grpc.ServerInterceptor):
    """Refuses streams beyond a number, so that threads are left for unary calls and health checks."""

    def __init__(self, max_streams: int) -> None:
        self._max_streams = max_streams
        self._free = threading.BoundedSemaphore(max_streams)

    def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Wrap the method of one call; only those that stream occupy a thread for long."""
        handler = continuation(handler_call_details)
        if handler is None or not (handler.request_streaming or handler.response_streaming):
            return handler
        return _wrap(handler, self._limited_unary, self._limited)

    def _limited(self, method: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with self._place():
            yield from method(request, context)

    def _limited_unary(self, method: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Any:
        with self._place():
            return method(request, context)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise OptserveError(
                Reason.TOO_MANY_STREAMS,
                f"{self._max_streams} streams are open, which is all that this server takes; try again later.",
                limit=self._max_streams,
            )
        try:
            yield
        finally:
            self._free.release()


def _abort(error: Exception, context: grpc.ServicerContext) -> Any:
    if isinstance(error, grpc.RpcError):
        # That is how gRPC ends the requests of a client that is gone; there is nobody to tell.
        logger.debug("a client is gone in the middle of a call")
        return
    status = to_status(error)
    if context.is_active():
        context.abort_with_status(rpc_status.to_status(status))


def _wrap(handler: Handler | None, unary: Callable[..., Any], stream: Callable[..., Any]) -> Handler | None:
    """`handler` with its method called through `unary` or `stream`, by the kind of its response."""
    if handler is None:
        return None
    kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    method = getattr(handler, "_".join(kind))
    if getattr(method, "experimental_non_blocking", False):
        # Such a method (Health.Watch) occupies no thread, which a wrapper would undo.
        return handler
    through = stream if handler.response_streaming else unary

    def wrapped(request: Any, context: grpc.ServicerContext) -> Any:
        return through(method, request, context)

    make = getattr(grpc, f"{'_'.join(kind)}_rpc_method_handler")
    return make(wrapped, handler.request_deserializer, handler.response_serializer)
