"""Writes all bytes, even if the disk takes only some of them per call."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from optserve_server.persistence.disk import SYSTEM_DISK, Buffer, Disk

_IOV_MAX = 512
"""Most parts per call. POSIX requires that a system takes 16; Linux takes 1024."""


def write_all(descriptor: int, parts: Sequence[Buffer], position: int, disk: Disk = SYSTEM_DISK) -> None:
    """Write all parts, one after the other, in as many calls as the disk needs.

    Args:
        descriptor: The file.
        parts: The bytes. Many small parts take one call.
        position: Byte of the file at which the first part begins.
        disk: The disk of the file.

    Raises:
        OSError: The disk refuses, or takes no bytes. Some bytes may have been written.
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
