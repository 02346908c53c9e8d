"""What the command takes from the environment."""

from __future__ import annotations

import os
from pathlib import Path

TARGET_FILE = "OPTSERVE_TARGET_FILE"
"""Names a file into which a server writes what clients connect to; the container image sets it."""

_DEFAULT_TARGET = "127.0.0.1:50051"
_MAX_TARGET_BYTES = 4096


def default_target() -> str:
    """What commands speak to without --target: the server that has written the file, or the default port."""
    path = os.environ.get(TARGET_FILE)
    if path:
        try:
            with Path(path).open("rb") as file:
                return file.read(_MAX_TARGET_BYTES).decode().strip() or _DEFAULT_TARGET
        # No server has written it, or none that this user may know of.
        except (OSError, UnicodeDecodeError):
            pass
    return _DEFAULT_TARGET
