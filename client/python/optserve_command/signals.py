"""Handlers of signals that come before a server has started."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_at_once() -> None:
    """Let SIGTERM and SIGINT end this process with exit code 0, until a server puts its own handlers in place.

    Nothing has to be stopped in order yet. Without handlers the first process of a container would ignore the signals.
    """
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"optserve serve: stopped before it had started\n")
    # Not by an exception, which a module that is being imported could catch.
    os._exit(0)
