"""Asks a server for its health with only a socket: a few frames of HTTP/2 that call grpc.health.v1.Health/Check.

A gRPC library would take ten times as long to load as the call takes; even dataclasses and json would double the time.
It uses no proxy, whatever the environment names, because it is meant for a server on the same host.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

from optserve_command.config import TLS_VARIABLES, default_target, tls_fields

STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
"""Names of grpc.health.v1.HealthCheckResponse.ServingStatus."""

DEFAULT_TIMEOUT_S = 5.0

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_OTHER_NAME = (62, 64)
"""OpenSSL's codes of a certificate for another host, and for another address."""
_MAX_FRAME_BYTES = 16_384
"""Largest frame that a server may send to a client that has not allowed larger ones."""


class ProbeError(Exception):
    """The server does not answer, or its answer is not a status."""


def parse(arguments: list[str]) -> tuple[str, float, bool] | None:
    """The arguments of `report` from a simple command line; None if the full parser has to handle it."""
    target, timeout_s, as_json = "", DEFAULT_TIMEOUT_S, False
    rest = [part for item in arguments for part in (item.split("=", 1) if item.startswith("--") else [item])]
    while rest:
        option = rest.pop(0)
        if option == "--json":
            as_json = True
        elif option == "--target" and rest:
            target = rest.pop(0)
        elif option == "--timeout-s" and rest:
            try:
                timeout_s = float(rest.pop(0))
            except ValueError:
                return None
        else:
            return None
    return target, timeout_s, as_json


def report(target: str, timeout_s: float, as_json: bool) -> int:
    """Ask for the health, print the answer, and return the exit code: 0 if the server is serving, else 1.

    Args:
        target: HOST:PORT or unix:PATH; empty for the default.
        timeout_s: Seconds to wait for the answer.
        as_json: Print it as JSON.
    """
    target = target or default_target()
    status, error = None, None
    try:
        status = ask(target, timeout_s, tls_fields())
    except ProbeError as unknown:
        error = str(unknown)
    if as_json:
        import json

        print(json.dumps({"target": target, "status": status, "error": error}, indent=2))
    elif status == "SERVING":
        print(f"{target} is {status}")
    else:
        print(f"optserve: {error or f'{target} is {status}'}", file=sys.stderr)
    return 0 if status == "SERVING" else 1


def ask(target: str, timeout_s: float, tls: dict[str, str] | None = None) -> str:
    """The status of a server, one of STATUSES.

    Args:
        target: HOST:PORT or unix:PATH.
        timeout_s: In all, in seconds.
        tls: The fields of `optserve.Tls` for a secured connection; empty or None for another.

    Raises:
        ProbeError: It does not answer in time, or not with a status.
    """
    if not 0 < timeout_s < float("inf"):
        raise ProbeError(f"The time to wait must be a positive number of seconds, not {timeout_s:g}.")
    connection = _Connection(time.monotonic() + timeout_s)
    try:
        connection.open(target)
        if tls:
            connection.secure(tls)
        return connection.check()
    except TimeoutError:
        raise ProbeError(f"{target} does not answer within {timeout_s:g} s.") from None
    except ConnectionResetError:
        raise ProbeError(f"{target} {_closed(tls)}.") from None
    except (OSError, UnicodeError) as error:
        # Only errors of TLS have a reason: the server refuses this side's certificate after the handshake.
        reason = getattr(error, "reason", None)
        what = f"refuses the connection over TLS: {reason}" if reason else f"does not answer: {_words(error)}"
        raise ProbeError(f"{target} {what}.") from None
    except _ClosedError:
        raise ProbeError(f"{target} {_closed(tls)}.") from None
    except ProbeError as error:
        raise ProbeError(f"{target} {error}.") from None
    finally:
        connection.close()


class _ClosedError(ProbeError):
    """The server has closed the connection."""


def _closed(tls: dict[str, str] | None) -> str:
    """What a connection that the server closes at once may mean."""
    wanted = "a client's certificate" if tls else "TLS"
    return f"closes the connection; it may ask for {wanted}"


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _unusable(error: Exception, *files: str) -> ProbeError:
    reason = getattr(error, "reason", None) or _words(error)
    return ProbeError(f"cannot be asked over TLS: {' or '.join(files)} cannot be used ({reason})")


class _Connection:
    """One call over one connection, until a deadline of time.monotonic."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._socket: socket.socket | None = None
        self._host = "localhost"
        self._scheme = b"\x86"  # :scheme http, which HPACK knows by number

    def open(self, target: str) -> None:
        if target.startswith("unix:"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._left_s())
            path = target.removeprefix("unix:")
            self._socket.connect(path.removeprefix("//") if path.startswith("///") else path)
            return
        for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
            target = target.removeprefix(scheme)
        host, _, port = target.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ProbeError("is neither HOST:PORT nor unix:PATH")
        self._host = host.strip("[]")
        self._socket = socket.create_connection((self._host, int(port)), self._left_s())

    def secure(self, tls: dict[str, str]) -> None:
        # Most health checks do without it.
        import ssl

        if ("certificate" in tls) != ("key" in tls):
            raise ProbeError("cannot be asked over TLS: a certificate and its key must be given together")
        # Without an authority, it trusts those of the system.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # What gRPC demands of a certificate: OpenSSL alone would demand more or less, by its version.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if "authority" in tls:
            try:
                context.load_verify_locations(tls["authority"])
            except OSError as error:
                raise _unusable(error, tls["authority"]) from None
        else:
            context.load_default_certs()
        if "certificate" in tls:
            try:
                context.load_cert_chain(tls["certificate"], tls["key"], password=lambda: "")
            except (OSError, ValueError) as error:
                raise _unusable(error, tls["certificate"], tls["key"]) from None
        context.set_alpn_protocols(["h2"])
        name = tls.get("server_name") or self._host
        try:
            # As the library does, which would leave the socket open.
            name.encode("idna")
        except UnicodeError:
            raise ProbeError(f"cannot be asked over TLS: {name!r} is not the name of a host") from None
        try:
            self._socket = context.wrap_socket(self._ready(), server_hostname=name)
        except ssl.SSLCertVerificationError as error:
            hint = f"; {TLS_VARIABLES['server_name']} names another" if error.verify_code in _OTHER_NAME else ""
            message = error.verify_message.rstrip(".")
            raise ProbeError(f"has a certificate that is not trusted: {message}{hint}") from None
        except ssl.SSLError as error:
            raise ProbeError(f"cannot be reached over TLS: {error.reason or error}") from None
        self._scheme = b"\x87"  # https

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def check(self) -> str:
        fields = (
            b"\x83" + self._scheme  # :method POST
            + b"\x04" + _text(b"/grpc.health.v1.Health/Check")  # :path
            + b"\x01" + _text(b"localhost")  # :authority
            + b"\x0f\x10" + _text(b"application/grpc")  # content-type
            + b"\x00" + _text(b"te") + _text(b"trailers")
        )  # fmt: skip
        self._send(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0)
            + _frame(_HEADERS, _END_HEADERS, 1, fields)
            # A request without fields has no bytes after the five bytes of its gRPC header.
            + _frame(_DATA, _END_STREAM, 1, bytes(5))
        )
        answer = b""
        while True:
            kind, flags, stream, payload = self._frame()
            if kind == _SETTINGS and not flags & _ACK:
                self._send(_frame(_SETTINGS, _ACK, 0))
            elif kind == _PING and not flags & _ACK:
                self._send(_frame(_PING, _ACK, 0, payload))
            elif kind == _DATA and stream == 1:
                answer += payload
                if len(answer) > _MAX_FRAME_BYTES:
                    raise ProbeError("answers with more than a status")
            elif kind == _GOAWAY or (kind == _RST_STREAM and stream == 1):
                raise ProbeError("refuses the call")
            if kind in (_DATA, _HEADERS) and stream == 1 and flags & _END_STREAM:
                return _status(answer)

    def _frame(self) -> tuple[int, int, int, bytes]:
        """(kind, flags, stream, payload) of the next frame."""
        head = self._receive(9)
        size = int.from_bytes(head[:3], "big")
        if size > _MAX_FRAME_BYTES:
            raise ProbeError("does not speak HTTP/2")
        return head[3], head[4], struct.unpack(">I", head[5:])[0] & 0x7FFF_FFFF, self._receive(size)

    def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            part = self._ready().recv(size - len(received))
            if not part:
                raise _ClosedError
            received += part
        return received

    def _send(self, data: bytes) -> None:
        self._ready().sendall(data)

    def _ready(self) -> socket.socket:
        if self._socket is None:
            raise ProbeError("is not connected")
        self._socket.settimeout(self._left_s())
        return self._socket

    def _left_s(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _text(value: bytes) -> bytes:
    """A string of HPACK of less than 127 bytes."""
    return bytes((len(value),)) + value


def _status(answer: bytes) -> str:
    """The status in a gRPC message: not compressed, its size in four bytes, then field 1, of one byte, or nothing."""
    if answer == bytes(5):
        return STATUSES[0]
    if len(answer) == 7 and answer[:6] == b"\0\0\0\0\2\x08" and answer[6] < len(STATUSES):
        return STATUSES[answer[6]]
    raise ProbeError("gives no status: it is not an optserve server, or it refuses the call")
