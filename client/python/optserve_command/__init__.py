"""The first part of the command `optserve`: it sets up signals and makes health checks before it loads anything large.

The client, gRPC and NumPy take half a second of a core to load. A container's health check would take so long every ten
seconds, and a server would ignore a signal to stop meanwhile. So nothing here imports them.
"""

from __future__ import annotations

import os
import signal
import sys

from optserve_command import probe
from optserve_command.signals import end_at_once


def main() -> None:
    """Entry point of the command."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        end_at_once()
    else:
        # The first process of a container ignores a signal without a handler.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Or gRPC would write a line for each handshake that fails, beside the error that says why. A server's own lines
        # are the only ones that do.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        question = probe.parse(arguments[1:]) if arguments[:1] == ["health"] else None
        if question:
            sys.exit(probe.report(*question))
        from optserve.cli import main as rest

        rest()
    except KeyboardInterrupt:
        sys.exit(130)
