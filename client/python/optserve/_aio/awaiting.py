"""Calls of the synchronous client for event loops: each in a thread, and cancelled by itself.

Whoever is cancelled ends its own call, wherever that waits, and no other. It goes on when the thread is through with
it: then nothing is written to the caller's arrays any more, and what the call has done is known.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from optserve._rpc.connection import INHERITED
from optserve._rpc.deadline import Cancellation, Patience
from optserve.errors import ClientUseError
from optserve.optimizer import Optimizer

MAX_CONCURRENT_CALLS = 32
"""Calls of one client under way at a time, besides those that may wait for one another; more wait for a thread."""

_MAX_THREADS = 1 << 20
"""Of calls that may wait for one another: no bound, as each optimizer or worker object makes one at a time."""

_T = TypeVar("_T")


class Threads:
    """The threads of one client."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._shared = ThreadPoolExecutor(MAX_CONCURRENT_CALLS, thread_name_prefix="optserve-aio")
        self._own = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="optserve-aio-own")
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self._closed = False

    async def run(
        self,
        call: Callable[[], _T],
        *,
        own: bool = False,
        grace_s: float = 0.0,
        undelivered: Callable[[_T], object] | None = None,
    ) -> _T:
        """Make a synchronous call in a thread.

        Args:
            call: It is ended when this is cancelled.
            own: Whether it may wait for other calls; then it has a thread at once, however many there are.
            grace_s: How long it may still take when this is cancelled; it is made even if it has not begun then.
            undelivered: Called with what it gives, if that comes too late for who has asked for it.

        Raises:
            ClientUseError: The client is closed, or was inherited by a forked process.
        """
        cancellation = Cancellation()
        future = self._submit(own, cancellation, call)
        try:
            await completion(future)
            return future.result()
        except asyncio.CancelledError:
            # One that has no thread yet never gets one.
            if grace_s or not future.cancel():
                await wait_until_done(future, grace_s)
                cancellation.cancel()
                await wait_until_done(future)
                if undelivered is not None and future.exception() is None:
                    undelivered(future.result())
            raise
        except GeneratorExit:
            # The loop is gone, and nothing can be awaited any more.
            cancellation.cancel()
            raise

    def _submit(self, own: bool, cancellation: Cancellation, call: Callable[[], _T]) -> Future[_T]:
        self.check_usable()
        with self._lock:
            if self._closed:
                raise ClientUseError("This client is closed.")
            try:
                future = (self._own if own else self._shared).submit(cancellation.run, call)
            except BaseException:
                # It may be in the queue all the same.
                cancellation.cancel()
                raise
            self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def check_usable(self) -> None:
        """Raise ClientUseError if these threads are those of the process that this one was forked from."""
        if os.getpid() != self._pid:
            raise ClientUseError(INHERITED)

    async def close(self) -> None:
        """Wait for all calls, which somebody has ended, and end the threads."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            under_way = list(self._under_way)
        for future in under_way:
            await wait_until_done(future)
        # No thread has anything left to do, so this does not wait for long.
        for pool in (self._shared, self._own):
            pool.shutdown()


def completion(future: Future[Any]) -> asyncio.Future[None]:
    """Is done when a call's thread is through with it; may be cancelled, which does nothing to the call."""
    loop = asyncio.get_running_loop()
    through: asyncio.Future[None] = loop.create_future()

    def notify(_: Future[Any]) -> None:
        # A loop that is closed needs no word.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: through.done() or through.set_result(None))

    future.add_done_callback(notify)
    return through


async def wait_until_done(future: Future[Any], timeout_s: float | None = None) -> None:
    """Wait until a call's thread is through with it, even if this is cancelled, which is the caller's to raise."""
    through = completion(future)
    time = asyncio.get_running_loop().time
    deadline = None if timeout_s is None else time() + timeout_s
    while not through.done():
        left_s = None if deadline is None else deadline - time()
        if left_s is not None and left_s <= 0:
            return
        with suppress(asyncio.CancelledError):
            await asyncio.wait([through], timeout=left_s)


class CallQueue:
    """The calls of one optimizer or worker object of which one is made at a time; the others wait without a thread.

    The next one begins when the reply of the one before has reached who had asked for it, or is known not to have.
    """

    def __init__(self, optimizer: Optimizer, threads: Threads) -> None:
        self._optimizer = optimizer
        self._threads = threads
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[Future[None]] = deque()

    async def run(
        self,
        call: Callable[[float | None], _T],
        timeout_s: float | None = None,
        *,
        is_step: bool = False,
        grace_s: float = 0.0,
    ) -> _T:
        """Make a call in turn.

        Args:
            call: Is given how long it may take, None for the default.
            timeout_s: Longest time to wait, for the turn and the call; `ClientConfig.step_timeout_s` by default.
            is_step: Whether it makes a step, whose reply the caller must know to be lost if it is.
            grace_s: How long it may still take when this is cancelled.
        """
        self._threads.check_usable()
        patience = self._optimizer._connection.patience(timeout_s)
        outcomes = self._optimizer._outcomes
        # What `turn` does; every step goes through this.
        waited = await self._enter(patience)
        unsettled = outcomes.unsettled
        try:
            return await self._threads.run(
                partial(call, patience.left_s if waited else timeout_s),
                own=True,
                grace_s=grace_s,
                undelivered=(lambda _: outcomes.undelivered()) if is_step else None,
            )
        except asyncio.CancelledError:
            # What a replay or a refresh has found out, nobody was told.
            outcomes.unsettled |= unsettled
            raise
        finally:
            self._let_next_in()

    @asynccontextmanager
    async def exclusive(self, patience: Patience) -> AsyncIterator[None]:
        """Have the turn for the length of a with-block.

        Raises:
            DeadlineExceededError: Patience has ended first.
            ClientUseError: The client was inherited by a forked process.
        """
        self._threads.check_usable()
        await self._enter(patience)
        try:
            yield
        finally:
            self._let_next_in()

    async def _enter(self, patience: Patience) -> bool:
        with self._lock:
            if not self._taken:
                self._taken = True
                return False
            ticket: Future[None] = Future()
            self._waiting.append(ticket)
        try:
            async with asyncio.timeout(patience.left_s):
                await completion(ticket)
        except BaseException as error:
            with self._lock, suppress(ValueError):
                self._waiting.remove(ticket)
            # Its turn may have come at the same moment.
            if not ticket.cancel():
                self._let_next_in()
            if isinstance(error, TimeoutError):
                patience.check()
            raise
        return True

    def _let_next_in(self) -> None:
        with self._lock:
            while self._waiting:
                ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    break
            else:
                self._taken = False
                return
        ticket.set_result(None)
