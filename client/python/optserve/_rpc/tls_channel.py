"""A channel whose certificates are replaced while it is open.

gRPC's credentials of a client are fixed when a channel is made. So this channel makes another one when the files have
changed. New calls use the new one; the old one is closed when its last call has ended.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc

from optserve._common.clock import Clock
from optserve._common.replaceable import Replaceable
from optserve.errors import InvalidArgumentError
from optserve.tls import Tls

logger = logging.getLogger(__name__)

_READS = 5
"""Most times that a key and a certificate are read when they are replaced meanwhile."""

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
        self._newest = Replaceable(
            tls.files, lambda: _Generation(open_channel(read_credentials(tls))), "TLS certificate", logger, clock
        )
        self._lock = clock.lock()
        self._closed = False
        self._present = self._newest.content
        self._retired: list[_Generation] = []
        self._subscribed: dict[Any, list[_Generation]] = {}

    def use(self) -> _Generation:
        """The generation for a new call, which is counted until `end_call`."""
        # Without the lock, which gRPC's thread takes at the end of each call: a file system may take its time.
        if not self._closed:
            self._newest.renew()
        with self._lock:
            used = self._newest.content
            if used is not self._present:
                self._retired.append(self._present)
                self._present = used
            unused = [generation for generation in self._retired if not generation.calls]
            self._retired = [generation for generation in self._retired if generation.calls]
            if self._closed:
                # It may have been opened after `close` had closed the others.
                unused.append(used)
            used.calls += 1
        for generation in unused:
            generation.channel.close()
        return used

    def end_call(self, generation: _Generation) -> None:
        """A call of that generation has ended. The next call closes the channel: this may be a thread of its own."""
        with self._lock:
            generation.calls -= 1

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """See grpc.Channel; for every generation with a call, because any of them may have the connection."""
        with self._lock:
            generations = [self._present, *(generation for generation in self._retired if generation.calls)]
            for generation in generations:
                # As a call, so that none is closed meanwhile.
                generation.calls += 1
                generation.channel.subscribe(callback, try_to_connect and generation is self._present)
            self._subscribed.setdefault(callback, []).extend(generations)

    def unsubscribe(self, callback: Any) -> None:
        """See grpc.Channel."""
        with self._lock:
            generations = self._subscribed.pop(callback, [])
        for generation in generations:
            generation.channel.unsubscribe(callback)
            self.end_call(generation)

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
        # The answers of these shapes are an iterator, which is also the call.
        if self._key[0].endswith("_stream"):
            return self._begin(lambda method: method(request, **options))
        return self._make(lambda method: method(request, **options))

    def with_call(self, request: Any, **options: Any) -> Any:
        """See grpc.UnaryUnaryMultiCallable."""
        return self._make(lambda method: method.with_call(request, **options))

    def future(self, request: Any, **options: Any) -> Any:
        """See grpc.UnaryUnaryMultiCallable."""
        return self._begin(lambda method: method.future(request, **options))

    def _make(self, make: Callable[[Any], Any]) -> Any:
        """Make a call, to its end."""
        generation = self._channel.use()
        try:
            return make(self._method(generation))
        finally:
            self._channel.end_call(generation)

    def _begin(self, begin: Callable[[Any], Any]) -> Any:
        """Begin a call that goes on after this method has returned."""
        generation = self._channel.use()
        try:
            call = begin(self._method(generation))
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
            # Lines between the certificates may be in any encoding.
            text = authority.decode("ascii", "replace").encode("ascii", "replace").decode("ascii")
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgumentError(
                f"The TLS authority {tls.authority} contains no certificate in PEM form, or a damaged one."
            ) from error
    if not tls.certificate:
        return grpc.ssl_channel_credentials(authority)
    return grpc.ssl_channel_credentials(authority, *_read_pair(tls))


def _read_pair(tls: Tls) -> tuple[bytes, bytes]:
    """The client's key and certificate, checked.

    Raises:
        InvalidArgumentError: One cannot be read, or they do not belong together.
    """
    for _ in range(_READS):
        key, certificate = _read(tls.key, "key"), _read(tls.certificate, "certificate")
        try:
            # Without a password, it would ask for one on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(tls.certificate, tls.key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"The TLS certificate {tls.certificate} and the key {tls.key} cannot be used: they are damaged, "
                f"encrypted, or do not belong together ({getattr(error, 'reason', None) or error})."
            ) from error
        # The library checks files only; so these must still be the ones that were read.
        if (key, certificate) == (_read(tls.key, "key"), _read(tls.certificate, "certificate")):
            return key, certificate
    raise InvalidArgumentError(f"The TLS certificate {tls.certificate} and the key {tls.key} change all the time.")


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"The TLS {what} {path} cannot be read: {error.strerror}.") from error
