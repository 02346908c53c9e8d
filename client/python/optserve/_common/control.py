"""The Unix socket beside a stream with shared memory. It carries the stream's short messages, one per packet.

A message and its answer take a quarter of the time that gRPC takes.
"""

from __future__ import annotations

import logging
import os
import socket
import struct

logger = logging.getLogger(__name__)

MAX_PACKET_BYTES = 64 << 10
"""Largest packet. Longer messages go through the stream itself."""

PROOF_TIMEOUT_S = 1.0
"""Seconds that a client may take to connect and to send the nonce."""


class ControlConnection:
    """A client's connection to a server's control socket.

    Args:
        name: Name of the socket.
        nonce: The bytes that prove to the server that this client sees the segment.

    Raises:
        OSError: The server has no socket, or this process cannot reach it, for example from another network namespace.
    """

    def __init__(self, name: str, nonce: bytes) -> None:
        if not name:
            raise OSError("the server has no control socket")
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._end.settimeout(PROOF_TIMEOUT_S)
            self._end.connect(f"\0{name}")
            # Any process may have bound the name, so only processes of the own user are trusted.
            if peer_uid(self._end) != os.geteuid():
                raise PermissionError("the control socket belongs to another user")
            self._end.send(nonce)
            # No time-out from here on: the patience of each call limits its wait.
            self._end.settimeout(None)
        except BaseException:
            self._end.close()
            raise

    def send(self, message: bytes) -> None:
        """Send a message of at most MAX_PACKET_BYTES. If the server is gone, `receive` returns empty bytes."""
        try:
            self._end.send(message)
        except OSError as error:
            logger.debug("the control socket is shut: %s", error)

    def receive(self) -> bytes:
        """Wait for a message; empty if the server is gone or the connection was shut."""
        try:
            return receive(self._end)
        except OSError as error:
            logger.debug("the control socket is shut: %s", error)
            return b""

    def shut(self) -> None:
        """End the connection, and end every wait for a message. Safe from any thread, and more than once."""
        shut(self._end)

    def close(self) -> None:
        """Close the socket. No thread may wait for a message meanwhile."""
        self._end.close()


def receive(end: socket.socket) -> bytes:
    """The next packet; empty if the other side is gone.

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
    """End a connection. Safe from any thread, and more than once."""
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("%s is shut already: %s", end, error)
