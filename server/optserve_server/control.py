"""A Unix socket beside a stream: carries its short messages within one host, in a quarter of the time of gRPC."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterable

from optserve.control import MAX_PACKET_BYTES, receive, shut

logger = logging.getLogger(__name__)

_PROOF_TIMEOUT_S = 10.0


class ControlSocket:
    """Answers one client, which has to prove first that it shares memory with this server.

    Args:
        nonce: What the client's first packet has to be.
        answer: Carries out a message and gives those that answer it. ConnectionError ends the connection.

    Attributes:
        name: Of the socket, which is in no file system (an abstract one), and ends with this process.

    Raises:
        OSError: There are no such sockets here.
    """

    def __init__(self, nonce: bytes, answer: Callable[[bytes], Iterable[bytes]]) -> None:
        self.name = f"optserve-{secrets.token_hex(16)}"
        self._nonce = nonce
        self._answer = answer
        self._lock = threading.Lock()
        self._closed = False
        self._peer: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(1)
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def close(self) -> None:
        """End the connection, from any thread; a message that is being answered is answered to nobody."""
        with self._lock:
            self._closed = True
            for end in (self._listener, self._peer):
                if end is not None:
                    shut(end)

    def _run(self) -> None:
        with self._listener:
            try:
                while not self._closed:
                    peer, _ = self._listener.accept()
                    with peer:
                        if self._proves_itself(peer) and self._take(peer):
                            self._listener.close()
                            self._serve(peer)
                            return
            # A socket that is shut or gone in the middle of a call: the end, from either side.
            except OSError as error:
                logger.debug("%s ends: %s", self.name, error)

    def _proves_itself(self, peer: socket.socket) -> bool:
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if uid != os.geteuid():
            logger.warning("user %s is refused at %s", uid, self.name)
            return False
        peer.settimeout(_PROOF_TIMEOUT_S)
        try:
            proven = secrets.compare_digest(peer.recv(len(self._nonce) + 1), self._nonce)
        except OSError:
            proven = False
        peer.settimeout(None)
        return proven

    def _take(self, peer: socket.socket) -> bool:
        with self._lock:
            if not self._closed:
                self._peer = peer
            return not self._closed

    def _serve(self, peer: socket.socket) -> None:
        while packet := receive(peer):
            for message in self._answer(packet):
                if len(message) > MAX_PACKET_BYTES:
                    raise ConnectionError(f"an answer has {len(message)} bytes")
                peer.send(message)
        with self._lock:
            self._peer = None
