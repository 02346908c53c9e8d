"""Signals that come before a server has begun."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_at_once() -> None:
    """Let SIGTERM and SIGINT end this process with exit code 0, until a server puts its own handlers in place.

    There is nothing to be ended in order yet. Without handlers the first process of a container would not hear the
    signals at all.
    """
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"optserve serve: stopped before it had begun\n")
    # Not by an exception, which could be caught by whatever is being imported.
    os._exit(0)
