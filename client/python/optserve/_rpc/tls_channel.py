"""A channel whose certificates are replaced while it is open.

gRPC's credentials of a client are fixed when a channel is made. So this channel makes another one when the files have
changed. New calls use the new one; the old one is closed when its last call has ended.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc

from optserve._common.clock import Clock
from optserve.errors import InvalidArgumentError, OptserveError
from optserve.tls import Tls

_Identity = tuple[tuple[int, int, int], ...]

Open = Callable[[grpc.ChannelCredentials], grpc.Channel]


class TlsChannel(grpc.Channel):
    """A channel with the certificates that are in the files now.

    Args:
        tls: The files.
        open_channel: Opens a channel with credentials.
        clock: Makes its lock.

    Raises:
        InvalidArgumentError: A file cannot be read, or a key does not belong to its certificate.
    """

    def __init__(self, tls: Tls, open_channel: Open, clock: Clock) -> None:
        self._tls = tls
        self._open = open_channel
        self._lock = clock.lock()
        self._files = _identity(tls)
        self._closed = False
        self._present = _Generation(open_channel(read_credentials(tls)))
        self._retired: list[_Generation] = []

    def use(self) -> _Generation:
        """The generation for a new call, which is counted until `end_call`."""
        files = _identity(self._tls)
        with self._lock:
            if files != self._files and not self._closed:
                self._replace(files)
            self._present.calls += 1
            unused = [generation for generation in self._retired if not generation.calls]
            self._retired = [generation for generation in self._retired if generation.calls]
            used = self._present
        for generation in unused:
            generation.channel.close()
        return used

    def _replace(self, files: _Identity) -> None:
        # Also if they cannot be used, so that they are read once for each change: a certificate may have been written,
        # and its key not yet.
        self._files = files
        with suppress(OptserveError):
            channel = self._open(read_credentials(self._tls))
            self._retired.append(self._present)
            self._present = _Generation(channel)

    def end_call(self, generation: _Generation) -> None:
        """A call of that generation has ended. The next call closes the channel: this may be a thread of its own."""
        with self._lock:
            generation.calls -= 1

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """See grpc.Channel; for the present generation."""
        self._present.channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """See grpc.Channel."""
        for generation in [self._present, *self._retired]:
            generation.channel.unsubscribe(callback)

    def unary_unary(self, method: str, *serializers: Any, **options: Any) -> grpc.UnaryUnaryMultiCallable:
        """See grpc.Channel."""
        return cast(grpc.UnaryUnaryMultiCallable, _Method(self, "unary_unary", method, serializers, options))

    def unary_stream(self, method: str, *serializers: Any, **options: Any) -> grpc.UnaryStreamMultiCallable:
        """See grpc.Channel."""
        return cast(grpc.UnaryStreamMultiCallable, _Method(self, "unary_stream", method, serializers, options))

    def stream_unary(self, method: str, *serializers: Any, **options: Any) -> grpc.StreamUnaryMultiCallable:
        """See grpc.Channel."""
        return cast(grpc.StreamUnaryMultiCallable, _Method(self, "stream_unary", method, serializers, options))

    def stream_stream(self, method: str, *serializers: Any, **options: Any) -> grpc.StreamStreamMultiCallable:
        """See grpc.Channel."""
        return cast(grpc.StreamStreamMultiCallable, _Method(self, "stream_stream", method, serializers, options))

    def close(self) -> None:
        """End every call."""
        with self._lock:
            self._closed = True
            generations = [self._present, *self._retired]
        for generation in generations:
            generation.channel.close()

    def __enter__(self) -> TlsChannel:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class _Generation:
    """A channel of gRPC's with the number of its calls under way."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.calls = 0
        self.methods: dict[tuple[str, str], Any] = {}


class _Method:
    """A method of the service, of any shape, called over the present generation of a channel."""

    def __init__(self, channel: TlsChannel, shape: str, method: str, serializers: Any, options: Any) -> None:
        self._channel = channel
        self._key = (shape, method)
        self._arguments = serializers, options

    def __call__(self, request: Any, **options: Any) -> Any:
        generation = self._channel.use()
        # The answers of these shapes are an iterator, which is also the call.
        if self._key[0].endswith("_stream"):
            return self._begin(generation, self._method(generation), request, options)
        try:
            return self._method(generation)(request, **options)
        finally:
            self._channel.end_call(generation)

    def with_call(self, request: Any, **options: Any) -> Any:
        """See grpc.UnaryUnaryMultiCallable."""
        generation = self._channel.use()
        try:
            return self._method(generation).with_call(request, **options)
        finally:
            self._channel.end_call(generation)

    def future(self, request: Any, **options: Any) -> Any:
        """See grpc.UnaryUnaryMultiCallable."""
        generation = self._channel.use()
        return self._begin(generation, self._method(generation).future, request, options)

    def _begin(self, generation: _Generation, begin: Callable[..., Any], request: Any, options: Any) -> Any:
        """Begin a call that goes on after this method has returned."""
        try:
            call = begin(request, **options)
        except BaseException:
            self._channel.end_call(generation)
            raise
        if not call.add_callback(lambda: self._channel.end_call(generation)):
            self._channel.end_call(generation)
        return call

    def _method(self, generation: _Generation) -> Any:
        method = generation.methods.get(self._key)
        if method is None:
            (shape, name), (serializers, options) = self._key, self._arguments
            method = generation.methods[self._key] = getattr(generation.channel, shape)(name, *serializers, **options)
        return method


def read_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """The credentials in the files.

    Raises:
        InvalidArgumentError: A file cannot be read, or a key does not belong to its certificate.
    """
    authority = _read(tls.authority, "authority") if tls.authority else None
    if authority is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authority.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
            raise InvalidArgumentError(
                f"The TLS authority {tls.authority} contains no certificate in PEM form, or a damaged one."
            ) from error
    if not tls.certificate:
        return grpc.ssl_channel_credentials(authority)
    certificate, key = _read(tls.certificate, "certificate"), _read(tls.key, "key")
    try:
        # Without a password, it would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"The TLS certificate {tls.certificate} and the key {tls.key} cannot be used: they are damaged, encrypted, "
            f"or do not belong together ({getattr(error, 'reason', None) or error})."
        ) from error
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"The TLS {what} {path} cannot be read: {error.strerror}.") from error


def _identity(tls: Tls) -> _Identity:
    """What differs after a file was written or replaced."""
    return tuple(_identity_of(path) for path in tls.files)


def _identity_of(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)
