"""A TCP proxy of the tests' own, that can cut connections and stop forwarding at a chosen byte."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards to `target` until told otherwise.

    Attributes:
        target: Where clients connect.
        refuse: Close new connections at once.
        cuts: How often connections were cut.
        accepted: How many connections were made.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._cut_after: dict[str, int | None] = {"up": None, "down": None}
        self._stalled = threading.Event()
        self.refuse = False
        self.cuts = 0
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, direction: str, count: int) -> None:
        """Cut every connection once, when `count` more bytes have gone `up` to the server or `down` to the client."""
        with self._lock:
            self._cut_after[direction] = count

    def stall(self) -> None:
        """Forward nothing any more, but keep the connections open."""
        self._stalled.set()

    def flow(self) -> None:
        """Forward again, on new connections."""
        self._stalled.clear()
        self.cut()

    def cut(self) -> None:
        """Cut every connection now."""
        with self._lock:
            connections, self._open = self._open, []
            self.cuts += 1
        for connection in connections:
            # shutdown wakes the thread that reads from it, which close would not.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        # shutdown wakes the thread that waits for connections, which close would not.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def reopen(self) -> float:
        """Listen again after `close`, at the same address; gives the time at which connections are taken."""
        self._listener = socket.create_server(("127.0.0.1", int(self.target.rpartition(":")[2])))
        threading.Thread(target=self._accept, daemon=True).start()
        return time.monotonic()

    def _accept(self) -> None:
        while True:
            try:
                downstream, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.refuse:
                downstream.close()
                continue
            try:
                upstream = socket.create_connection(self._upstream)
            except OSError:
                downstream.close()
                continue
            with self._lock:
                self._open += [downstream, upstream]
            for source, sink, direction in ((downstream, upstream, "up"), (upstream, downstream, "down")):
                threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 14):
                if self._stalled.is_set():
                    continue
                passed = self._allowed(direction, len(data))
                sink.sendall(data[:passed])
                if passed < len(data):
                    self.cut()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _allowed(self, direction: str, size: int) -> int:
        with self._lock:
            left = self._cut_after[direction]
            if left is None:
                return size
            if left >= size:
                self._cut_after[direction] = left - size
                return size
            self._cut_after[direction] = None
            return left


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    running = Proxy(target)
    try:
        yield running
    finally:
        running.close()
