"""One connection: deadlines, retries and errors of all calls, whatever a call does."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

from optserve._common import malloc, wire
from optserve._common.clock import SYSTEM, Clock
from optserve._rpc.channel import INHERITED, begun, is_connected, open_channel
from optserve._rpc.deadline import Patience, Watchdog, cancellation
from optserve._rpc.proxies import proxy_hint
from optserve._rpc.retry import Backoff, is_retryable
from optserve._rpc.target import check_target
from optserve.config import ClientConfig
from optserve.errors import (
    ClientUseError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    OptserveError,
    UnreachableError,
    from_rpc_error,
)
from optserve.v1 import additions_pb2, checkpoints_pb2, replicas_pb2, service_pb2, service_pb2_grpc

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].full_name

_Response = TypeVar("_Response")
_Frame = TypeVar("_Frame")
_Page = TypeVar("_Page", bound="_HasNextPage")


class _HasNextPage(Protocol):
    next_page_token: str


logger = logging.getLogger(__name__)

CLOSE_S = 3.0
"""Seconds that `close` waits for the connection to end. That takes milliseconds, unless a call never ends."""


_decode_export = wire.decoder(checkpoints_pb2.ExportStateResponse)
_decode_pull = wire.decoder(replicas_pb2.PullParametersResponse)


def not_a_message() -> InternalError:
    """The error for bytes of the server that are not a message."""
    return InternalError("The server's answer is not a message.")


class Closeable(Protocol):
    """A stream with a thread of gRPC, which does not end when the channel is closed."""

    def close(self) -> None:
        """End the stream. Safe from any thread, and more than once."""


class Connection:
    """One connection to one server: its calls, with deadlines, retries and typed errors.

    Args:
        target: The server, as gRPC writes it, such as `host:port` or `unix:PATH`.
        config: The client's settings.
        clock: The time.
        channel: The channel for the calls; None to open one to the target.

    Raises:
        InvalidArgumentError: The target is not the address of a server.

    Attributes:
        clock: The time.
        same_host: Whether the server can share memory with this process.
        has_shared: Names of optimizers with which this client has shared memory.
    """

    def __init__(
        self, target: str, config: ClientConfig, clock: Clock = SYSTEM, channel: grpc.Channel | None = None
    ) -> None:
        if channel is None:
            check_target(target)
        self.target = target
        self.clock = clock
        self.same_host = False
        self.has_shared: set[str] = set()
        self.config = config
        if config.keep_freed_memory:
            malloc.keep_freed_memory()
        self._watchdog = Watchdog(clock)
        self._pid = os.getpid()
        # Ends the watchdog's thread when a client is dropped without being closed.
        weakref.finalize(self, _end_watchdog, self._watchdog, self._pid).atexit = False
        self._closing = clock.event()
        self._lock = clock.lock()
        self._streams: weakref.WeakSet[Closeable] = weakref.WeakSet()
        self._channel = channel or open_channel(target, config, clock)
        self.stub = service_pb2_grpc.OptimizerServiceStub(self._channel)
        # gRPC does not decode the server's streams: at bytes that are no message it would end the call on this side
        # only, and on the server the call would keep its place.
        self._stream_steps = self._channel.stream_stream(f"/{_SERVICE}/StreamSteps", None, None)
        self._export_state = self._channel.unary_stream(
            f"/{_SERVICE}/ExportState", checkpoints_pb2.ExportStateRequest.SerializeToString, None
        )
        self._import_state = self._channel.stream_unary(
            f"/{_SERVICE}/ImportState", None, checkpoints_pb2.ImportStateResponse.FromString
        )
        self._pull_parameters = self._channel.unary_stream(
            f"/{_SERVICE}/PullParameters", replicas_pb2.PullParametersRequest.SerializeToString, None
        )
        self._push_parameters = self._channel.stream_unary(
            f"/{_SERVICE}/PushParameters", None, replicas_pb2.PushParametersResponse.FromString
        )
        self._add_parameters = self._channel.stream_unary(
            f"/{_SERVICE}/AddParameters", None, additions_pb2.AddParametersResponse.FromString
        )

    def call(self, method: Callable[..., _Response], request: Any, *, timeout_s: float | None = None) -> _Response:
        """Make a unary call, and retry it while its errors are retryable. The call must be idempotent.

        Raises:
            OptserveError: The server has refused the call, or has not answered in time.
        """
        timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
        patience = self.patience(timeout_s)
        backoff = Backoff(self.config, self.clock)
        while True:
            self.check_usable()
            try:
                with self._while_open():
                    return _call_cancellable(method, request, max(patience.left_s, 0.001))
            except grpc.RpcError as rpc_error:
                error = self.translate(rpc_error, timeout_s)
            if not is_retryable(error):
                raise error
            patience.pause(backoff.next_pause_s(error), error)

    def call_once(self, method: Callable[..., _Response], request: Any) -> _Response:
        """Make a unary call without retries.

        Raises:
            OptserveError: The server has refused the call, or has not answered in time.
        """
        self.check_usable()
        try:
            with self._while_open():
                return _call_cancellable(method, request, self.config.timeout_s)
        except grpc.RpcError as error:
            raise self.translate(error, self.config.timeout_s) from None

    def pages(self, method: Callable[..., _Page], request: Any) -> Iterator[_Page]:
        """Make a unary call for each page of a list. All calls together may take `timeout_s`.

        Raises:
            DeadlineExceededError: The time is up before the end of the list.
            InternalError: A page's token leads back to an earlier page.
            OptserveError: The server has refused a call, or has not answered in time.
        """
        left_s = self.config.timeout_s
        tokens = {""}
        while left_s > 0:
            began = self.clock.monotonic()
            page = self.call(method, request, timeout_s=left_s)
            left_s -= self.clock.monotonic() - began
            yield page
            if not page.next_page_token:
                return
            if page.next_page_token in tokens:
                raise InternalError(
                    f"The list of {self.target} never ends: a page's token leads back to an earlier page."
                )
            tokens.add(page.next_page_token)
            request.page_token = page.next_page_token
        raise DeadlineExceededError(
            f"The list at {self.target} had not ended after {len(tokens) - 1} pages and {self.config.timeout_s:g} s."
        )

    def patience(self, timeout_s: float | None) -> Patience:
        """The patience of a call that begins now.

        Raises:
            InvalidArgumentError: `timeout_s` is negative or not finite.
        """
        if timeout_s is not None and not 0 <= timeout_s < threading.TIMEOUT_MAX:
            raise InvalidArgumentError(f"timeout_s must be a number of seconds, not {timeout_s!r}.")
        return Patience(self._watchdog, self.config.step_timeout_s if timeout_s is None else timeout_s)

    def stream_steps(self, messages: Iterator[bytes]) -> Any:
        """Start a StreamSteps call, whose answers are bytes. It has no deadline of its own; see Patience."""
        self.check_usable()
        with self._while_open():
            return begun(self._stream_steps(messages))

    def close_with_connection(self, stream: Closeable) -> None:
        """Close the stream when this connection is closed."""
        with self._lock:
            self._streams.add(stream)

    def export_state(self, request: checkpoints_pb2.ExportStateRequest, timeout_s: float) -> Any:
        """Start an ExportState call. Returns an iterator of frames."""
        self.check_usable()
        with self._while_open():
            return _frames(begun(self._export_state(request, timeout=timeout_s)), _decode_export)

    def import_state(self, messages: Iterator[bytes], timeout_s: float) -> checkpoints_pb2.ImportStateResponse:
        """Make an ImportState call."""
        self.check_usable()
        with self._while_open():
            return _call_cancellable(self._import_state, messages, timeout_s)

    def pull_parameters(self, request: replicas_pb2.PullParametersRequest, timeout_s: float) -> Any:
        """Start a PullParameters call. Returns an iterator of frames."""
        self.check_usable()
        with self._while_open():
            return _frames(begun(self._pull_parameters(request, timeout=timeout_s)), _decode_pull)

    def push_parameters(self, messages: Iterator[bytes], timeout_s: float) -> replicas_pb2.PushParametersResponse:
        """Make a PushParameters call."""
        self.check_usable()
        with self._while_open():
            return _call_cancellable(self._push_parameters, messages, timeout_s)

    def add_parameters(self, messages: Iterator[bytes], timeout_s: float) -> additions_pb2.AddParametersResponse:
        """Make an AddParameters call."""
        self.check_usable()
        with self._while_open():
            return _call_cancellable(self._add_parameters, messages, timeout_s)

    def translate(self, error: grpc.RpcError, timeout_s: float) -> OptserveError:
        """The exception for a failed call."""
        translated = from_rpc_error(error, self.target, proxy_hint(self.target))
        if self._closing.is_set():
            return ClientUseError("This client was closed in the middle of a call.")
        if isinstance(translated, DeadlineExceededError) and not translated.reason:
            return self.late(timeout_s)
        return translated

    def late(self, timeout_s: float) -> DeadlineExceededError:
        """The exception for a call without an answer: an UnreachableError if there is no connection to a server."""
        message = f"{self.target} did not answer within {timeout_s:g} s.{proxy_hint(self.target)}"
        if self._closing.is_set() or is_connected(self._channel):
            return DeadlineExceededError(message)
        return UnreachableError(f"{message} There is no connection to a server.")

    def check_usable(self) -> None:
        """Raise ClientUseError if the client is closed or was inherited by fork."""
        if self._closing.is_set():
            raise ClientUseError("This client is closed.")
        if os.getpid() != self._pid:
            raise ClientUseError(INHERITED)

    def close(self) -> None:
        """Close the connection. May be called more than once."""
        self._closing.set()
        _end_watchdog(self._watchdog, self._pid)
        if os.getpid() == self._pid:
            self._close_channel()
            with self._lock:
                streams = list(self._streams)
            for stream in streams:
                stream.close()

    def _close_channel(self) -> None:
        """Close gRPC's channel, in at most CLOSE_S.

        gRPC waits for every call to end. Ctrl-C at a bad moment within gRPC can leave a call that never ends.
        """
        closing = self.clock.thread(self._channel.close, "optserve-close")
        try:
            closing.start()
        except RuntimeError:
            # No thread can be started: the interpreter is ending, or the system has no more threads.
            self._channel.close()
            return
        closing.join(CLOSE_S)
        if closing.is_alive():
            logger.warning("the connection to %s has not ended %g s after it was closed", self.target, CLOSE_S)

    @contextmanager
    def _while_open(self) -> Iterator[None]:
        """Begin a call in the with-block; raises ClientUseError if another thread closes the channel meanwhile."""
        try:
            yield
        except ValueError:
            if self._closing.is_set():
                raise ClientUseError("This client is closed.") from None
            raise


def _end_watchdog(watchdog: Watchdog, pid: int) -> None:
    """End a watchdog's thread. Only in the process that made it: after a fork its lock may be held for ever."""
    if os.getpid() == pid:
        watchdog.close()


def _call_cancellable(method: Callable[..., _Response], request: Any, timeout_s: float) -> _Response:
    """Make a call with one answer; the cancellation of this thread, if there is one, can end it.

    Raises:
        grpc.RpcError: The call failed.
        StepCancelledError: The call was cancelled.
        InternalError: The call succeeded without an answer.
    """
    cancelled = cancellation()
    if cancelled is None:
        return _require_answer(method(request, timeout=timeout_s))
    call = method.future(request, timeout=timeout_s)  # pyright: ignore[reportFunctionMemberAccess]
    with cancelled.watching(call.cancel):
        try:
            return _require_answer(call.result())
        except grpc.FutureCancelledError:
            cancelled.check()
            raise ClientUseError("This client was closed in the middle of a call.") from None


def _frames(call: Any, decode: Callable[[bytes], _Frame]) -> Iterator[_Frame]:
    """The messages of a stream from the server. Close this iterator to end the call."""
    cancelled = cancellation()
    try:
        with cancelled.watching(call.cancel) if cancelled is not None else nullcontext():
            for raw in call:
                try:
                    frame = decode(raw)
                except DecodeError as error:
                    raise not_a_message() from error
                yield frame
    finally:
        # Ends the call also if the caller has stopped reading.
        call.cancel()


def _require_answer(response: _Response | None) -> _Response:
    """The answer of a unary call; raises InternalError for None, which gRPC returns if the server sent no message."""
    if response is None:
        raise InternalError("The server ended a call with status OK, but without an answer.")
    return response
