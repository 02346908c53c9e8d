"""The command `optserve`, before anything heavy is loaded: signals first, and health checks without the rest.

Loading the client, gRPC and NumPy takes half a second of a core. A container's health check would pay that every ten
seconds, and a server that is told to stop meanwhile would not hear it. So nothing here imports them.
"""

from __future__ import annotations

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
        # As the first process of a container a program hears no signal that it has no handler for.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        question = probe.parse(arguments[1:]) if arguments[:1] == ["health"] else None
        if question:
            sys.exit(probe.report(*question))
        from optserve.cli import main as rest

        rest()
    except KeyboardInterrupt:
        sys.exit(130)
