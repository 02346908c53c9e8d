"""The Unix socket beside a stream with shared memory: carries the stream's messages, one per packet, if they are short.

It takes a quarter of the time that gRPC takes for a message and its answer.
"""

from __future__ import annotations

import logging
import os
import socket
import struct

logger = logging.getLogger(__name__)

MAX_PACKET_BYTES = 64 << 10
"""Longer messages go through the stream itself."""

PROOF_TIMEOUT_S = 1.0
"""How long a connection may take to be made and proven."""


class ControlConnection:
    """A client's connection to a server's control socket.

    Args:
        name: Of the socket.
        nonce: Proves that memory is shared.

    Raises:
        OSError: There is none, or it cannot be reached from here, for example from another network namespace.
    """

    def __init__(self, name: str, nonce: bytes) -> None:
        if not name:
            raise OSError("the server has none")
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._end.settimeout(PROOF_TIMEOUT_S)
            self._end.connect(f"\0{name}")
            # Anybody may have bound a name; our own user is trusted anyhow.
            if peer_uid(self._end) != os.geteuid():
                raise PermissionError("it belongs to another user")
            self._end.send(nonce)
            # Whoever waits for an answer has a patience of their own.
            self._end.settimeout(None)
        except BaseException:
            self._end.close()
            raise

    def send(self, message: bytes) -> None:
        """Send a message of at most MAX_PACKET_BYTES; that the server is gone shows when its answer is received."""
        try:
            self._end.send(message)
        except OSError as error:
            logger.debug("the control socket is shut: %s", error)

    def receive(self) -> bytes:
        """Wait for a message; empty when the server is gone or the connection was shut."""
        try:
            return receive(self._end)
        except OSError as error:
            logger.debug("the control socket is shut: %s", error)
            return b""

    def shut(self) -> None:
        """Let go of the server, and let whoever waits for a message go on. Safe from any thread, more than once."""
        shut(self._end)

    def close(self) -> None:
        """Release the socket, for which nobody may wait any more."""
        self._end.close()


def receive(end: socket.socket) -> bytes:
    """The next packet; empty when the other side is gone.

    Raises:
        OSError: The socket is shut, or the packet is too long.
    """
    packet = end.recv(MAX_PACKET_BYTES + 1)
    if len(packet) > MAX_PACKET_BYTES:
        raise OSError(f"a packet has more than {MAX_PACKET_BYTES} bytes")
    return packet


def peer_uid(end: socket.socket) -> int:
    """The user on the other side of a connection."""
    _, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid


def shut(end: socket.socket) -> None:
    """End a connection, from any thread; more than once, too."""
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("%s is shut already: %s", end, error)
