"""Writing all that is to be written, however little the disk takes at a time."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from optserve_server.persistence.disk import SYSTEM_DISK, Buffer, Disk

_IOV_MAX = 512
"""Parts per write; the least that POSIX systems take is 16, Linux takes 1024."""


def write_all(descriptor: int, parts: Sequence[Buffer], position: int, disk: Disk = SYSTEM_DISK) -> None:
    """Write all of the parts, one behind the other, however few bytes the disk takes at a time.

    Args:
        descriptor: Of the file.
        parts: Bytes; many small ones are one call.
        position: In the file, of the first byte.
        disk: Where the file is.

    Raises:
        OSError: The disk refuses, or takes none of them. Some may have been written.
    """
    pending = [memoryview(part).cast("B") for part in parts if len(part)]
    while pending:
        written = disk.write(descriptor, pending[:_IOV_MAX], position)
        if not written:
            raise OSError(errno.EIO, "the disk took no bytes")
        position += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]
