"""A local server for notebooks, tests and scripts: a child process that ends with its with-block."""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from optserve.config import environment_without_settings
from optserve.errors import UnavailableError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class LocalServer:
    """A running server. In a notebook `LocalServer.start()` and `stop()` replace the with-block.

    Attributes:
        target: The address for `connect`.
        process: The child process.

    Example:
        >>> server = optserve.LocalServer.start()               # doctest: +SKIP
        >>> client = optserve.connect(server.target)            # doctest: +SKIP
        >>> server.stop()                                       # doctest: +SKIP
    """

    target: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls, data_dir: str | Path | None = None, backend: str = "auto", options: Sequence[str] = ()
    ) -> LocalServer:
        """Start a server on a free port of this machine. It ends with this process at the latest, also after a crash.

        Args:
            data_dir: Folder for the journal and checkpoints, which outlive the server; None to keep nothing.
            backend: `auto`, `cupy`, `numba` or `numpy`.
            options: Further options of `optserve serve`. Environment variables OPTSERVE_… do not reach the server.

        Raises:
            UnavailableError: The server did not start; the message has the end of its log.
        """
        # -P: `python -m` would look for modules in the working folder first, and find the user's random.py there.
        command = [sys.executable, "-P", "-m", "optserve_server", "--port", "0", "--backend", backend]
        command += ["--announce", "--exit-on-eof", "--log-level", "warning", *options]
        if data_dir is not None:
            command += ["--data-dir", str(data_dir)]
        with tempfile.TemporaryFile() as log:
            # A new session, so that Ctrl-C reaches only this process, which then stops the server in order.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=environment_without_settings(),
            )
            try:
                return cls(_target(process, log), process)
            except BaseException:
                _stop(process)
                raise

    def stop(self) -> None:
        """Let the server finish its steps and end. Does nothing if it has ended."""
        _stop(self.process)

    def __repr__(self) -> str:
        ended = self.process.poll()
        return f"LocalServer({self.target!r}, {'running' if ended is None else f'ended with {ended}'})"


@contextmanager
def local_server(
    data_dir: str | Path | None = None, backend: str = "auto", options: Sequence[str] = ()
) -> Iterator[LocalServer]:
    """Start a server on a free port of this machine, and stop it at the end of the with-block.

    For the arguments and errors see `LocalServer.start`.

    Example:
        >>> with optserve.local_server() as server, optserve.connect(server.target) as client:  # doctest: +SKIP
        ...     print(client.server_info().backend)
    """
    server = LocalServer.start(data_dir, backend, options)
    try:
        yield server
    finally:
        server.stop()


def _target(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """Wait for the line that the server prints when it is ready."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    output = process.stdout
    threading.Thread(target=lambda: lines.put(output.readline() if output else b""), daemon=True).start()
    try:
        line = lines.get(timeout=START_TIMEOUT_S).decode()
    except queue.Empty:
        line = ""
    if line.startswith("ready "):
        return line.removeprefix("ready ").strip()
    # The log is complete once the server has ended.
    _stop(process)
    log.seek(0)
    tail = log.read().decode(errors="replace")[-2000:]
    if "No module named optserve_server" in tail:
        tail = "The server is not installed; pip install 'optserve[server]' installs it."
    raise UnavailableError(f"The local server did not start.\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the server finish its steps and end; kill it if it does not end."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
