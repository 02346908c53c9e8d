"""Settings of the command from the environment."""

from __future__ import annotations

import os
from pathlib import Path

TARGET_FILE = "OPTSERVE_TARGET_FILE"
"""Environment variable with the path of a file into which a server writes its target. The container image sets it."""

TLS_VARIABLES = {
    "authority": "OPTSERVE_CLIENT_TLS_AUTHORITY",
    "certificate": "OPTSERVE_CLIENT_TLS_CERTIFICATE",
    "key": "OPTSERVE_CLIENT_TLS_KEY",
    "server_name": "OPTSERVE_CLIENT_TLS_SERVER_NAME",
}
"""Environment variables for connections of the commands that are secured: the fields of `optserve.Tls`."""

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


def tls_fields() -> dict[str, str]:
    """The fields of `optserve.Tls` that the environment sets; empty for connections that are not secured."""
    return {name: value for name, variable in TLS_VARIABLES.items() if (value := os.environ.get(variable, ""))}
