"""The Unix socket beside a stream with shared memory: carries the stream's messages, one per packet, if they are short.

It takes a quarter of the time that gRPC takes for a message and its answer.
"""

from __future__ import annotations

import logging
import socket

logger = logging.getLogger(__name__)

MAX_PACKET_BYTES = 64 << 10
"""Longer messages go through the stream itself."""


class ControlConnection:
    """A client's connection to a server's control socket.

    Args:
        name: Of the socket.
        nonce: Proves that memory is shared.

    Raises:
        OSError: The socket cannot be reached from here, for example from another network namespace.
    """

    def __init__(self, name: str, nonce: bytes) -> None:
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._end.connect(f"\0{name}")
            self._end.send(nonce)
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


def shut(end: socket.socket) -> None:
    """End a connection, from any thread; more than once, too."""
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("%s is shut already: %s", end, error)
