"""Makes calls of the synchronous client for event loops. Each call runs in a thread and has its own cancellation.

Cancelling a task ends only its own call, wherever the call waits. The task goes on when the call's thread has finished:
then no thread writes to the caller's arrays any more, and it is known what the call has done.
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

from optserve._rpc.channel import INHERITED
from optserve._rpc.deadline import Cancellation, Patience
from optserve.errors import ClientUseError
from optserve.optimizer import Optimizer

MAX_CONCURRENT_CALLS = 32
"""Threads of one client for calls that never wait for each other. More calls wait for a thread."""

_MAX_THREADS = 1 << 20
"""Threads for calls that may wait for each other: practically no limit, since each object makes one call at a time."""

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
            call: The call. It is cancelled when the task is.
            own: Whether the call may wait for other calls. It then gets a thread at once.
            grace_s: Seconds that the call may still take after the task was cancelled, even if it has not begun.
            undelivered: Called with the call's result if the task was cancelled before.

        Raises:
            ClientUseError: The client is closed, or was inherited by a forked process.
        """
        cancellation = Cancellation()
        future = self._submit(own, cancellation, call)
        try:
            await completion(future)
            return future.result()
        except asyncio.CancelledError:
            # A call that has not begun yet is dropped.
            if grace_s or not future.cancel():
                await wait_until_done(future, grace_s)
                cancellation.cancel()
                await wait_until_done(future)
                if undelivered is not None and future.exception() is None:
                    undelivered(future.result())
            raise
        except GeneratorExit:
            # The event loop is closed, so nothing can be awaited.
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
                # The call may be in the pool's queue nevertheless.
                cancellation.cancel()
                raise
            self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def check_usable(self) -> None:
        """Raise ClientUseError in a forked process, which has not inherited the threads."""
        if os.getpid() != self._pid:
            raise ClientUseError(INHERITED)

    async def close(self) -> None:
        """Wait for all calls to end, and end the threads. The caller has cancelled the calls or closed the client."""
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
    """A future of this loop that is done when the call's thread has finished. Cancelling it does not end the call."""
    loop = asyncio.get_running_loop()
    through: asyncio.Future[None] = loop.create_future()

    def notify(_: Future[Any]) -> None:
        # The loop may be closed.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: through.done() or through.set_result(None))

    future.add_done_callback(notify)
    return through


async def wait_until_done(future: Future[Any], timeout_s: float | None = None) -> None:
    """Wait until the call's thread has finished, also if the task is cancelled; the caller raises CancelledError."""
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
    """Makes the calls of one optimizer or worker object one at a time. The others wait without a thread.

    The next call begins when the reply of the previous one has reached its task, or is known to be lost.
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
        """Wait for the calls before, then make a call.

        Args:
            call: The call; its argument is the time that is left, in seconds, or None for the default.
            timeout_s: Longest time for the wait and the call; `ClientConfig.step_timeout_s` by default.
            is_step: Whether the call makes a step. If its reply is lost, the step becomes unsettled.
            grace_s: Seconds that the call may still take after the task was cancelled.
        """
        self._threads.check_usable()
        patience = self._optimizer._connection.patience(timeout_s)
        outcomes = self._optimizer._outcomes
        # As `exclusive` does; written out, because every step goes through this.
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
            # The task does not get what a replay or a refresh has found out.
            outcomes.unsettled |= unsettled
            raise
        finally:
            self._let_next_in()

    @asynccontextmanager
    async def exclusive(self, patience: Patience) -> AsyncIterator[None]:
        """Let no other call run for the length of a with-block.

        Raises:
            DeadlineExceededError: The patience has ended first.
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
            # The ticket may have been served at the same moment.
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
