"""Gives every call a place and a thread, ends calls that wait too long for their clients, and makes errors statuses.

Each kind of calls has its own threads, so no kind waits for another. A call of gRPC's Python server holds a thread from
its headers on. Here it gets a place, and loses it if its message does not arrive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_status import rpc_status

from optserve._common import machine, malloc
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge.gate.kinds import ConcurrencyLimit, Kind
from optserve_server.edge.gate.places import (
    DELIVERY,
    FIRST_MESSAGE,
    MIN_BYTES_PER_S,
    NEXT_MESSAGE,
    SPARED_S,
    Place,
    Places,
    WaitLimits,
)
from optserve_server.edge.gate.relief import Relief
from optserve_server.edge.gate.replies import Replies
from optserve_server.edge.status import to_status

logger = logging.getLogger(__name__)

Handler = grpc.RpcMethodHandler
Continuation = Callable[[grpc.HandlerCallDetails], Handler | None]

CHECK_EVERY_S = 0.25
"""Seconds between searches for calls that have waited too long for their clients."""

RELIEF_EVERY_S = 0.1
"""Seconds between checks of memory, which fills faster than calls become overdue."""

PROTECTED = 64
"""Unary calls that may wait for their message as long as the largest message may take, see Places."""

ARRIVING = PROTECTED + 32
"""Unary calls that may wait for their messages, the protected ones included; the same number of health checks."""

QUEUED_PER_THREAD = 8
"""Unary calls that may wait for each unary thread."""

LEAVING = 192
"""Calls that have no place yet, or have lost it and still hold a thread."""

REFUSAL_THREADS = 2
"""Threads that refuse calls for which there is no thread."""

HEALTH_REPLIES_BYTES = 4 << 20
"""Bytes of health replies that clients have not taken, see Replies."""

STALLED_S = 5.0
"""Seconds after which a stream whose client does not take a message may be evicted for a newcomer."""

_HEALTH = f"/{health.SERVICE_NAME}/"
_CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]


class Gate(grpc.ServerInterceptor):
    """Gives calls their places and threads, and ends those that wait too long for their clients.

    Args:
        config: Has the limits.

    Attributes:
        refusals: Threads that refuse calls; gRPC uses them by default.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._max_message_bytes = config.max_message_bytes
        queued = (1 + QUEUED_PER_THREAD) * config.unary_threads
        arriving = ARRIVING + LEAVING
        self._unary = Kind("unary", Places("calls wait for their messages", ARRIVING, PROTECTED), arriving + queued)
        self._health = Kind("health", Places("health checks wait for their messages", ARRIVING), arriving)
        watchers = Places("health watchers are there", config.max_watchers)
        self._watch = Kind("watch", watchers, config.max_watchers + LEAVING)
        self._streams = Kind("stream", Places("streams are open", config.max_streams), config.max_streams + LEAVING)
        first, ends = {FIRST_MESSAGE: SPARED_S}, {FIRST_MESSAGE: config.receive_s}
        taking = {DELIVERY: config.idle_step_s}
        self._arriving = WaitLimits(first, ends)
        # The message of a unary call may be large, and its connection slow.
        upload_s = max(config.receive_s, config.max_message_bytes / MIN_BYTES_PER_S)
        self._uploading = WaitLimits(first, {FIRST_MESSAGE: upload_s})
        # A client may be silent between two steps for hours. If its place is needed, it opens another stream later.
        idle = {NEXT_MESSAGE: config.idle_step_s, DELIVERY: STALLED_S}
        self._between_messages = WaitLimits({**first, **idle}, {**ends, **taking})
        stalled = {NEXT_MESSAGE: STALLED_S, DELIVERY: STALLED_S}
        transfer_ends = {**ends, **taking, NEXT_MESSAGE: config.idle_step_s}
        self._transferring = WaitLimits({**first, **stalled}, transfer_ends, by_bytes=True)
        self._unary_limit = ConcurrencyLimit(config.unary_threads)
        ending = (self._streams.places, self._unary.places)
        self._relief = Relief(config.memory_bytes, ending, machine.own_bytes, malloc.trim)
        self._replies = Replies(config.max_reply_bytes, config.idle_step_s)
        self._health_replies = Replies(HEALTH_REPLIES_BYTES, config.receive_s)
        self.refusals = ThreadPoolExecutor(REFUSAL_THREADS, thread_name_prefix="refusal")
        self._wrapped: dict[str, tuple[Kind, Handler]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._end_overdue_calls, name="overdue calls", daemon=True).start()

    def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Wrap the method of one call. Called in gRPC's only event thread."""
        method: str = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None:
            handler = continuation(handler_call_details)
            if handler is None:
                return None
            known = self._wrapped[method] = self._wrap(method, handler)
        kind, wrapped = known
        return kind.one_call(wrapped) if kind.enter() else self._refusal(kind)

    def _wrap(self, method: str, handler: Handler) -> tuple[Kind, Handler]:
        """The kind of a method, and its handler with a thread and a place of that kind around each call."""
        if not handler.request_streaming and not handler.response_streaming:
            is_health = method.startswith(_HEALTH)
            kind = self._health if is_health else self._unary
            if is_health:
                return kind, self._unary_handler(handler, kind, self._arriving, self._health_replies, None)
            return kind, self._unary_handler(handler, kind, self._uploading, self._replies, self._unary_limit)
        kind = self._watch if method.startswith(_HEALTH) else self._streams
        one_way = kind is self._streams and handler.request_streaming != handler.response_streaming
        limits = self._transferring if one_way else self._between_messages
        if handler.response_streaming:
            return kind, self._streaming_handler(handler, kind, limits)
        return kind, self._uploading_handler(handler, kind, limits)

    def _unary_handler(
        self, handler: Handler, kind: Kind, limits: WaitLimits, replies: Replies, limit: ConcurrencyLimit | None
    ) -> Handler:
        """The handler of a call with one message each way; a stream to gRPC, so that this code receives the message."""
        method: Any = handler.unary_unary
        serialize: Any = handler.response_serializer

        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            try:
                peer = context.peer()
                with kind.places.place(peer, _end_with_reason(context), limits):
                    request = self._single_message(requests, handler)
                with limit.hold() if limit else nullcontext():
                    reply = serialize(method(request, context))
                    # Inside the limit, so that at most `unary_threads` replies wait for memory.
                    taken = replies.add(len(reply), peer, context.cancel)
                if not context.add_callback(taken):
                    taken()
            # Every error becomes a status here.
            except Exception as error:  # noqa: BLE001
                return _abort(error, context)
            else:
                return reply
            finally:
                kind.leave()

        return grpc.stream_unary_rpc_method_handler(answer)

    def _streaming_handler(self, handler: Handler, kind: Kind, limits: WaitLimits) -> Handler:
        """The handler of a call whose reply is a stream."""
        method: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with kind.places.place(context.peer(), _end_with_reason(context), limits) as place:
                    if handler.request_streaming:
                        given: Any = _received(requests, place)
                    else:
                        given = self._single_message(requests, handler)
                        place.resume()
                    with closing(method(given, context)) as messages:
                        for message in messages:
                            place.wait(DELIVERY)
                            yield message
                            place.resume()
                            if limits.by_bytes:
                                place.record_progress(len(message))
            except Exception as error:  # noqa: BLE001
                _abort(error, context)
            finally:
                kind.leave()

        deserializer = handler.request_deserializer if handler.request_streaming else None
        return grpc.stream_stream_rpc_method_handler(answer, deserializer, handler.response_serializer)

    @staticmethod
    def _uploading_handler(handler: Handler, kind: Kind, limits: WaitLimits) -> Handler:
        """The handler of a call whose request is a stream, and whose reply is one message."""
        method: Any = handler.stream_unary

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                with kind.places.place(context.peer(), _end_with_reason(context), limits) as place:
                    return method(_received(requests, place), context)
            except Exception as error:  # noqa: BLE001
                return _abort(error, context)
            finally:
                kind.leave()

        return grpc.stream_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    def _single_message(self, requests: Iterator[bytes], handler: Handler) -> Any:
        """Receive and parse the only message of a call."""
        raw = next(requests, None)
        if raw is None:
            raise OptserveError(Reason.INVALID_FIELD, "The call ended without its message.")
        if len(raw) > self._max_message_bytes:
            raise OptserveError(
                Reason.MESSAGE_TOO_LARGE,
                f"The request has {len(raw)} bytes; this server accepts {self._max_message_bytes}. Use the streaming "
                "calls for larger models.",
                limit_bytes=self._max_message_bytes,
                actual_bytes=len(raw),
            )
        parse: Any = handler.request_deserializer
        try:
            return parse(raw)
        except DecodeError as error:
            raise OptserveError(Reason.INVALID_FIELD, "The bytes are no request message of this method.") from error

    def _refusal(self, kind: Kind) -> Handler:
        """A handler that refuses a call for which there is no thread."""

        def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> None:
            _abort(kind.places.full_error(), context)

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _end_overdue_calls(self) -> None:
        check_at = 0.0
        while not self._closed.wait(RELIEF_EVERY_S):
            self._relief.check()
            if time.monotonic() < check_at:
                continue
            check_at = time.monotonic() + CHECK_EVERY_S
            for kind in (self._unary, self._health, self._watch, self._streams):
                kind.places.end_overdue()
            for replies in (self._replies, self._health_replies):
                replies.end_overdue()

    def close(self, timeout_s: float) -> bool:
        """End the threads, after gRPC has ended the calls. Returns False if some are alive after `timeout_s`."""
        self._closed.set()
        until = time.monotonic() + timeout_s
        pools = [kind.pool for kind in (self._unary, self._health, self._watch, self._streams)] + [self.refusals]
        for pool in pools:
            pool.shutdown(wait=False)
        threads = [thread for pool in pools for thread in pool._threads]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


def _received(requests: Iterator[Any], place: Place) -> Iterator[Any]:
    """The messages of a client; between them its place waits for the client."""
    for message in requests:
        place.resume()
        yield message
        place.wait(NEXT_MESSAGE)


def _end_with_reason(context: grpc.ServicerContext) -> Callable[[str], None]:
    """A function that cancels a call from any thread, with a message for its client.

    Only the call's own thread can send a status with details, but it is inside gRPC, waiting for a message. The public
    `cancel` sends no message, so the method of gRPC's internal call object is used while there is one.
    """

    def end(why: str) -> None:
        beneath: Any = getattr(getattr(context, "_rpc_event", None), "call", None)
        try:
            beneath.cancel(_CANCELLED, why)
        except (AttributeError, TypeError):
            context.cancel()

    return end


def _abort(error: Exception, context: grpc.ServicerContext) -> Any:
    if isinstance(error, grpc.RpcError):
        # gRPC raises this for a client that is gone, so nobody can receive a status.
        logger.debug("a client is gone in the middle of a call")
        return
    status = to_status(error)
    if context.is_active():
        context.abort_with_status(rpc_status.to_status(status))
