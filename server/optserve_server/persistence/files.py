"""Files and folders that only their owner may read, and writing to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

Buffer = bytes | memoryview

_IOV_MAX = 512
"""Parts per write; the least that POSIX systems take is 16, Linux takes 1024."""


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there."""
    path.mkdir(mode=0o700, exist_ok=True)


def create(path: Path) -> BinaryIO:
    """Make a file, or empty it, for reading and writing."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b")


def write_all(descriptor: int, parts: Sequence[Buffer], position: int) -> None:
    """Write all of the parts, one behind the other, however few bytes the disk takes at a time.

    Args:
        descriptor: Of the file.
        parts: Bytes; many small ones are one call.
        position: In the file, of the first byte.

    Raises:
        OSError: The disk refuses, or takes none of them. Some may have been written.
    """
    pending = [memoryview(part).cast("B") for part in parts if len(part)]
    while pending:
        written = os.pwritev(descriptor, pending[:_IOV_MAX], position)
        if not written:
            raise OSError(errno.EIO, "the disk took no bytes")
        position += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]
