"""Settings of the command from the environment."""

from __future__ import annotations

import os
from pathlib import Path

TARGET_FILE = "OPTSERVE_TARGET_FILE"
"""Environment variable with the path of a file into which a server writes its target. The container image sets it."""

_DEFAULT_TARGET = "127.0.0.1:50051"
_MAX_TARGET_BYTES = 4096


def default_target() -> str:
    """The target of commands without --target: that of the server that has written the file, or the default port."""
    path = os.environ.get(TARGET_FILE)
    if path:
        try:
            with Path(path).open("rb") as file:
                return file.read(_MAX_TARGET_BYTES).decode().strip() or _DEFAULT_TARGET
        # No server has written the file, or this user may not read it.
        except (OSError, UnicodeDecodeError):
            pass
    return _DEFAULT_TARGET
