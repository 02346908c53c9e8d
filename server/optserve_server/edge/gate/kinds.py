"""Kinds of calls. Each kind has places and threads of its own, so no call waits for calls of another kind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge.gate.places import Places

QUEUE_WAIT_S = 10.0
"""Seconds that a unary call may wait for a thread before it is refused with TOO_MANY_STREAMS."""


class Kind:
    """A kind of calls, with its places and threads.

    Args:
        name: Name of the threads.
        places: The places of these calls.
        limit: Number of threads. Calls without a place occupy a thread too.

    Attributes:
        pool: The threads.
    """

    def __init__(self, name: str, places: Places, limit: int) -> None:
        self.places = places
        self.pool = ThreadPoolExecutor(limit, thread_name_prefix=name)
        self._free = threading.BoundedSemaphore(limit)
        # One entry for each reserved thread whose call never ran.
        self._unused: deque[None] = deque()

    def enter(self) -> bool:
        """Reserve a thread for a call; False if there is none. Called in gRPC's event thread."""
        while self._unused:
            self._unused.pop()
            self._free.release()
        return self._free.acquire(blocking=False)

    def one_call(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """The handler for one call. It runs in the thread that `enter` has reserved; the thread is free after the call.

        An interceptor may ask for a handler and then refuse the call. Then the handler never runs, and the thread
        becomes free when the handler is garbage-collected.
        """
        streams = handler.response_streaming
        run = _Run(handler.stream_stream if streams else handler.stream_unary, self.pool, self._unused)
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return make(run, handler.request_deserializer, handler.response_serializer)

    def leave(self) -> None:
        """Give a reserved thread back."""
        self._free.release()


class _Run:
    """The function of one call, which runs in its kind's threads. If it never runs, it adds an entry to `unused`."""

    def __init__(self, behaviour: Any, pool: ThreadPoolExecutor, unused: deque[None]) -> None:
        self.experimental_thread_pool = pool
        self._behaviour = behaviour
        self._unused = unused
        self._has_run = False

    def __call__(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        self._has_run = True
        return self._behaviour(requests, context)

    def __del__(self) -> None:
        # Takes no lock: the garbage collector may call this anywhere, also in a thread that holds the lock.
        if not self._has_run:
            self._unused.append(None)


class ConcurrencyLimit:
    """Lets at most `threads` calls run at a time; the others wait."""

    def __init__(self, threads: int) -> None:
        self._free = threading.BoundedSemaphore(threads)
        self._threads = threads

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait until the call may run, for the length of a with-block; raises TOO_MANY_STREAMS after QUEUE_WAIT_S."""
        if not self._free.acquire(timeout=QUEUE_WAIT_S):
            raise OptserveError(
                Reason.TOO_MANY_STREAMS,
                f"This server answers {self._threads} calls at a time, and is busy with as many; try again.",
                limit=self._threads,
            )
        try:
            yield
        finally:
            self._free.release()
