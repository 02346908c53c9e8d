"""Checks the address of a server. gRPC takes any text for one, and then looks for a host of that name."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from optserve.errors import InvalidArgumentError

_FORMS = "write HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051, or unix:PATH"
_SCHEMES_OF_GRPC = ("unix:", "unix-abstract:", "vsock:", "dns:", "ipv4:", "ipv6:", "xds:")
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]@]+):([0-9]{1,5})")


def check_target(target: object) -> None:
    """Raise InvalidArgumentError for something that is no address: HOST:PORT, or a scheme of gRPC such as `unix:`."""
    if not isinstance(target, str):
        raise InvalidArgumentError(f"The address of a server is a text, not {target!r}: {_FORMS}.")
    if target.startswith(_SCHEMES_OF_GRPC) and target not in _SCHEMES_OF_GRPC:
        return
    found = _HOST_PORT.fullmatch(target)
    if found and 0 < int(found[2]) < 1 << 16:
        return
    if "://" in target:
        instead = urlsplit(target).netloc
        instead = f"write {instead}" if _HOST_PORT.fullmatch(instead) else _FORMS
        raise InvalidArgumentError(f"{target!r} is a URL, not the address of a server: {instead}.")
    raise InvalidArgumentError(f"{target!r} is not the address of a server: {_FORMS}.")
