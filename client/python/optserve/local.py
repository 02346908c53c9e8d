"""A server of one's own, for notebooks, tests and scripts: a child process that ends with its with-block."""

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

from optserve.errors import UnavailableError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class LocalServer:
    """A running server.

    Attributes:
        target: What to connect to.
        process: The child process.
    """

    target: str
    process: subprocess.Popen[bytes]


@contextmanager
def local_server(
    data_dir: str | Path | None = None, backend: str = "auto", options: Sequence[str] = ()
) -> Iterator[LocalServer]:
    """Start a server on a free port of this machine, and stop it at the end of the with-block.

    It ends with this process too, however that ends.

    Args:
        data_dir: Folder for what must outlive the server.
        backend: `auto`, `cupy`, `numba` or `numpy`.
        options: Further options of `optserve serve`.

    Raises:
        UnavailableError: The server did not start; the message has the end of its log.

    Example:
        >>> with optserve.local_server() as server, optserve.connect(server.target) as client:  # doctest: +SKIP
        ...     print(client.server_info().backend)
    """
    # -P: `python -m` would look for modules in the working folder first, and find the user's random.py there.
    command = [sys.executable, "-P", "-m", "optserve_server", "--port", "0", "--backend", backend]
    command += ["--announce", "--exit-on-eof", "--log-level", "warning", *options]
    if data_dir is not None:
        command += ["--data-dir", str(data_dir)]
    with tempfile.TemporaryFile() as log:
        # A session of its own: Ctrl-C is for this process, which then stops the server in order.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        try:
            yield LocalServer(_target(process, log), process)
        finally:
            _stop(process)


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
    _stop(process)
    log.seek(0)
    tail = log.read().decode(errors="replace")[-2000:]
    if "No module named optserve_server" in tail:
        tail = "The server is not installed; pip install 'optserve[server]' brings it."
    raise UnavailableError(f"The local server did not start.\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the server drain, and kill it only if it does not."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
