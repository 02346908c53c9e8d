"""A Unix socket beside a stream, for its short messages within one host. It takes a quarter of gRPC's time."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Generator

from optserve._common.control import MAX_PACKET_BYTES, PROOF_TIMEOUT_S, peer_uid, receive, shut

logger = logging.getLogger(__name__)

_BACKLOG = 8


class ControlSocket:
    """Answers the messages of one client. The client first has to prove that it shares memory with this server.

    Args:
        nonce: The bytes that the first packet of the client must have.
        answer: Carries out a message and yields the answers. ConnectionError ends the connection.

    Attributes:
        name: Name of the abstract socket, which has no file and ends with this process.
        proven: Whether the client has sent the nonce.

    Raises:
        OSError: The system has no such sockets, or no thread.
    """

    def __init__(self, nonce: bytes, answer: Callable[[bytes], Generator[bytes]]) -> None:
        self.name = f"optserve-{secrets.token_hex(16)}"
        self._nonce = nonce
        self._answer = answer
        # Held while a socket is closed or shut down, so that no other file can get its descriptor number in between.
        self._lock = threading.Lock()
        self._closed = False
        self.proven = False
        self._refused = False
        self._peer: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(_BACKLOG)
            threading.Thread(target=self._run, name="control", daemon=True).start()
        except (OSError, RuntimeError) as error:
            self._listener.close()
            raise OSError(f"a control socket cannot be made: {error}") from error

    def close(self) -> None:
        """End the connection; the answer to a message that is being handled is dropped. Safe from any thread."""
        with self._lock:
            self._closed = True
            for end in (self._listener, self._peer):
                if end is not None and end.fileno() >= 0:
                    shut(end)

    def _run(self) -> None:
        try:
            while not self._closed:
                peer, _ = self._listener.accept()
                try:
                    if self._adopt(peer) and self._sends_the_nonce(peer):
                        self.proven = True
                        self._close(self._listener)
                        self._serve(peer)
                        return
                finally:
                    self._close(peer)
        # One side has shut down or closed the socket, so the connection ends.
        except OSError as error:
            logger.debug("%s ends: %s", self.name, error)
        finally:
            self._close(self._listener)

    def _close(self, end: socket.socket) -> None:
        with self._lock:
            end.close()
            if end is self._peer:
                self._peer = None

    def _adopt(self, peer: socket.socket) -> bool:
        with self._lock:
            self._peer = peer
            return not self._closed

    def _sends_the_nonce(self, peer: socket.socket) -> bool:
        uid = peer_uid(peer)
        if uid != os.geteuid():
            # Logged once for each socket, because another user can connect any number of times.
            logger.log(logging.DEBUG if self._refused else logging.WARNING, "user %s is refused at %s", uid, self.name)
            self._refused = True
            return False
        peer.settimeout(PROOF_TIMEOUT_S)
        try:
            proven = secrets.compare_digest(peer.recv(len(self._nonce) + 1), self._nonce)
        except OSError as error:
            logger.debug("a client at %s has sent no nonce: %s", self.name, error)
            return False
        peer.settimeout(None)
        return proven

    def _serve(self, peer: socket.socket) -> None:
        while packet := receive(peer):
            answers = self._answer(packet)
            try:
                for message in answers:
                    if len(message) > MAX_PACKET_BYTES:
                        raise ConnectionError(f"an answer has {len(message)} bytes")
                    # The server does not wait for a client that does not read its answers: it ends the connection.
                    peer.send(message, socket.MSG_DONTWAIT)
            finally:
                # Also after an error, because the generator may hold the stream's lock.
                answers.close()
