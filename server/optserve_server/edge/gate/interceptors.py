"""The edge around every call: a place and a thread of its kind, patience with its client, and a status for its error.

Each kind of calls has threads of its own, so that none waits for those of another. A call of gRPC's Python server holds
a thread from its headers on; here it is given one of its kind's places, and loses it if its message does not come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_status import rpc_status

from optserve._common import machine, malloc
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge.gate.places import (
    FIRST_MESSAGE,
    MIN_BYTES_PER_S,
    NEXT_MESSAGE,
    SPARED_S,
    TAKING,
    Patience,
    Place,
    Places,
)
from optserve_server.edge.gate.relief import Relief
from optserve_server.edge.gate.replies import Replies
from optserve_server.edge.status import to_status

logger = logging.getLogger(__name__)

Handler = grpc.RpcMethodHandler
Continuation = Callable[[grpc.HandlerCallDetails], Handler | None]

LOOK_EVERY_S = 0.25
"""How often it is looked for calls that have waited too long for their clients."""

LASTING = 64
"""Unary calls that may wait for their messages for all the time that large ones may take, see Places."""

ARRIVING = LASTING + 32
"""Unary calls that may wait for their messages, those included that came when so many did; likewise health checks."""

QUEUED_PER_THREAD = 8
"""Unary calls that may wait for each unary thread."""

TURN_WAIT_S = 10.0
"""How long they do so before they are told to come back."""

LEAVING = 192
"""Calls that have just come, or have lost their places and not left their threads yet."""

REFUSAL_THREADS = 2
"""Threads that tell calls that there is no room for them."""

HEALTH_REPLIES_BYTES = 4 << 20
"""Answers of health checks that their clients have not taken, see Replies."""

STALLED_S = 5.0
"""A stream whose client has not taken a message for so long gives way to one that needs the place."""

_HEALTH = f"/{health.SERVICE_NAME}/"
_CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]


class Kind:
    """Calls of one kind.

    Args:
        name: Of its threads.
        places: Theirs.
        limit: Most that have a thread at a time, those included that arrive, leave, or wait for a turn.

    Attributes:
        pool: Their threads.
    """

    def __init__(self, name: str, places: Places, limit: int) -> None:
        self.places = places
        self.pool = ThreadPoolExecutor(limit, thread_name_prefix=name)
        self._free = threading.BoundedSemaphore(limit)

    def enter(self) -> bool:
        """Whether there is a thread for one more call. Called in gRPC's event thread."""
        return self._free.acquire(blocking=False)

    def own(self, behaviour: Any) -> Any:
        """A method of the kind as gRPC calls it, in these threads."""
        behaviour.experimental_thread_pool = self.pool
        return behaviour

    def leave(self) -> None:
        """A call that has entered leaves its thread."""
        self._free.release()


class Turns:
    """Lets so many calls be answered at a time; others wait."""

    def __init__(self, threads: int) -> None:
        self._free = threading.BoundedSemaphore(threads)
        self._threads = threads

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One at a time of them for the length of a with-block, or raise TOO_MANY_STREAMS."""
        if not self._free.acquire(timeout=TURN_WAIT_S):
            raise OptserveError(
                Reason.TOO_MANY_STREAMS,
                f"{self._threads} calls are being answered, which is all that this server does at a time; try again.",
                limit=self._threads,
            )
        try:
            yield
        finally:
            self._free.release()


class Gate(grpc.ServerInterceptor):
    """Gives calls their places and threads, and ends those that wait too long for their clients.

    Args:
        config: For the limits.

    Attributes:
        refusals: Threads for calls that are refused, which are those that gRPC takes by default.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._max_message_bytes = config.max_message_bytes
        queued = (1 + QUEUED_PER_THREAD) * config.unary_threads
        arriving = ARRIVING + LEAVING
        self._unary = Kind("unary", Places("calls wait for their messages", ARRIVING, LASTING), arriving + queued)
        self._health = Kind("health", Places("health checks wait for their messages", ARRIVING), arriving)
        watchers = Places("health watchers are there", config.max_watchers)
        self._watch = Kind("watch", watchers, config.max_watchers + LEAVING)
        self._streams = Kind("stream", Places("streams are open", config.max_streams), config.max_streams + LEAVING)
        first, ends = {FIRST_MESSAGE: SPARED_S}, {FIRST_MESSAGE: config.receive_s}
        taking = {TAKING: config.idle_step_s}
        self._arriving = Patience(first, ends)
        # The message of a unary call may be large, and its wire slow.
        upload_s = max(config.receive_s, config.max_message_bytes / MIN_BYTES_PER_S)
        self._uploading = Patience(first, {FIRST_MESSAGE: upload_s})
        # Between two steps a client may be silent for hours; it comes back if its place is needed meanwhile.
        idle = {NEXT_MESSAGE: config.idle_step_s, TAKING: STALLED_S}
        self._between_messages = Patience({**first, **idle}, {**ends, **taking})
        stalled = {NEXT_MESSAGE: STALLED_S, TAKING: STALLED_S}
        transfer_ends = {**ends, **taking, NEXT_MESSAGE: config.idle_step_s}
        self._moving = Patience({**first, **stalled}, transfer_ends, by_bytes=True)
        self._turns = Turns(config.unary_threads)
        ending = (self._streams.places, self._unary.places)
        self._relief = Relief(config.memory_bytes, ending, machine.own_bytes, malloc.trim)
        self._replies = Replies(config.max_reply_bytes, config.idle_step_s)
        self._health_replies = Replies(HEALTH_REPLIES_BYTES, config.receive_s)
        self.refusals = ThreadPoolExecutor(REFUSAL_THREADS, thread_name_prefix="refusal")
        self._wrapped: dict[str, tuple[Kind, Handler]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="patience", daemon=True).start()

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
        return wrapped if kind.enter() else self._refusal(kind)

    def _wrap(self, method: str, handler: Handler) -> tuple[Kind, Handler]:
        """The kind of a method, and its handler with a thread and a place of that kind around each call."""
        if not handler.request_streaming and not handler.response_streaming:
            is_health = method.startswith(_HEALTH)
            kind = self._health if is_health else self._unary
            if is_health:
                return kind, self._unary_handler(handler, kind, self._arriving, self._health_replies, None)
            return kind, self._unary_handler(handler, kind, self._uploading, self._replies, self._turns)
        kind = self._watch if method.startswith(_HEALTH) else self._streams
        one_way = kind is self._streams and handler.request_streaming != handler.response_streaming
        patience = self._moving if one_way else self._between_messages
        if handler.response_streaming:
            return kind, self._streaming_handler(handler, kind, patience)
        return kind, self._uploading_handler(handler, kind, patience)

    def _unary_handler(
        self, handler: Handler, kind: Kind, patience: Patience, replies: Replies, turns: Turns | None
    ) -> Handler:
        """Of a call with one message each way. For gRPC it streams, so that the message is waited for in here."""
        method: Any = handler.unary_unary
        serialize: Any = handler.response_serializer

        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            try:
                peer = context.peer()
                with kind.places.place(peer, _ending(context), patience):
                    request = self._only(requests, handler)
                with turns.turn() if turns else nullcontext():
                    reply = serialize(method(request, context))
                    # Within the turn, so that no more replies wait for room than there are turns.
                    taken = replies.add(len(reply), peer, context.cancel)
                if not context.add_callback(taken):
                    taken()
            # The one translator: whatever it is, it becomes a status.
            except Exception as error:  # noqa: BLE001
                return _abort(error, context)
            else:
                return reply
            finally:
                kind.leave()

        return grpc.stream_unary_rpc_method_handler(kind.own(answer))

    def _streaming_handler(self, handler: Handler, kind: Kind, patience: Patience) -> Handler:
        """Of a call whose reply is a stream."""
        method: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with kind.places.place(context.peer(), _ending(context), patience) as place:
                    if handler.request_streaming:
                        given: Any = _incoming(requests, place)
                    else:
                        given = self._only(requests, handler)
                        place.go_on()
                    with closing(method(given, context)) as messages:
                        for message in messages:
                            place.wait(TAKING)
                            yield message
                            place.go_on()
                            if patience.by_bytes:
                                place.moved(len(message))
            except Exception as error:  # noqa: BLE001
                _abort(error, context)
            finally:
                kind.leave()

        deserializer = handler.request_deserializer if handler.request_streaming else None
        return grpc.stream_stream_rpc_method_handler(kind.own(answer), deserializer, handler.response_serializer)

    @staticmethod
    def _uploading_handler(handler: Handler, kind: Kind, patience: Patience) -> Handler:
        """Of a call whose request is a stream, and whose reply is not."""
        method: Any = handler.stream_unary

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                with kind.places.place(context.peer(), _ending(context), patience) as place:
                    return method(_incoming(requests, place), context)
            except Exception as error:  # noqa: BLE001
                return _abort(error, context)
            finally:
                kind.leave()

        return grpc.stream_unary_rpc_method_handler(
            kind.own(answer), handler.request_deserializer, handler.response_serializer
        )

    def _only(self, requests: Iterator[bytes], handler: Handler) -> Any:
        """The message of a call that has one."""
        raw = next(requests, None)
        if raw is None:
            raise OptserveError(Reason.INVALID_FIELD, "The call ended without its message.")
        if len(raw) > self._max_message_bytes:
            raise OptserveError(
                Reason.MESSAGE_TOO_LARGE,
                f"The request has {len(raw)} bytes; this server accepts {self._max_message_bytes}. Larger models take "
                "the calls that stream.",
                limit_bytes=self._max_message_bytes,
                actual_bytes=len(raw),
            )
        parse: Any = handler.request_deserializer
        try:
            return parse(raw)
        except DecodeError as error:
            raise OptserveError(Reason.INVALID_FIELD, "The message is none that this method takes.") from error

    def _refusal(self, kind: Kind) -> Handler:
        """Tells a call that there is no thread for it."""

        def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> None:
            _abort(kind.places.full(), context)

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _look(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            for kind in (self._unary, self._health, self._watch, self._streams):
                kind.places.end_those_who_wait_too_long()
            for replies in (self._replies, self._health_replies):
                replies.end_those_not_taken()
            self._relief.look()

    def close(self, timeout_s: float) -> bool:
        """Let the threads end, once gRPC has ended the calls; False if some have not within `timeout_s`."""
        self._closed.set()
        until = time.monotonic() + timeout_s
        pools = [kind.pool for kind in (self._unary, self._health, self._watch, self._streams)] + [self.refusals]
        for pool in pools:
            pool.shutdown(wait=False)
        threads = [thread for pool in pools for thread in pool._threads]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


def _incoming(requests: Iterator[Any], place: Place) -> Iterator[Any]:
    """The messages of a client, which is waited for meanwhile."""
    for message in requests:
        place.go_on()
        yield message
        place.wait(NEXT_MESSAGE)


def _ending(context: grpc.ServicerContext) -> Callable[[str], None]:
    """What ends a call from any thread, with words for its client.

    The call's own thread, which alone may send a status with details, is in gRPC, which lets it go for a message or the
    end of the call only. And the public `cancel` has no words; that of the call beneath has, if it is still there.
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
        # That is how gRPC ends the requests of a client that is gone; there is nobody to tell.
        logger.debug("a client is gone in the middle of a call")
        return
    status = to_status(error)
    if context.is_active():
        context.abort_with_status(rpc_status.to_status(status))
