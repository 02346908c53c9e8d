"""The calls that change files and make changes durable, so that a simulation can have a disk that fails and loses.

What only reads is not here: it sees what was written, durable or not.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

Buffer = bytes | memoryview


class Disk:
    """The system's own. Files and folders that are made may be read by their owner only.

    All of these raise OSError where the disk refuses; what it was asked for may then have been done in part.
    """

    # Each looks its function up when it is called: a test may let that fail, or kill the process in it.

    def open(self, path: Path, flags: int) -> int:
        """Open a file; gives its descriptor."""
        return os.open(path, flags, 0o600)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def create(self, path: Path) -> BinaryIO:
        """Make a file, or empty it, for reading and writing."""
        return os.fdopen(self.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "w+b")

    def temporary(self, folder: Path, prefix: str) -> BinaryIO:
        """A new file in a folder, which removes its name when it is closed."""
        return tempfile.NamedTemporaryFile(dir=folder, prefix=prefix)  # pyright: ignore[reportReturnType]

    def write(self, descriptor: int, parts: Sequence[Buffer], position: int) -> int:
        """Write parts behind one another from a position on; gives the bytes that were taken, which may be fewer."""
        return os.pwritev(descriptor, parts, position)

    def write_one(self, descriptor: int, data: Buffer, position: int) -> int:
        """Write bytes from a position on; gives how many were taken."""
        return os.pwrite(descriptor, data, position)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """Take room for a file of that size, or raise OSError."""
        os.posix_fallocate(descriptor, 0, size_bytes)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Cut a file."""
        os.ftruncate(descriptor, size_bytes)

    def sync(self, descriptor: int) -> None:
        """Make a file durable; or, of a folder, its names."""
        os.fsync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        """Make the content of a file durable."""
        os.fdatasync(descriptor)

    def sync_path(self, path: Path) -> None:
        """What `sync` does, of a file or folder that is not open."""
        descriptor = self.open(path, os.O_RDONLY)
        try:
            self.sync(descriptor)
        finally:
            self.close(descriptor)

    def rename(self, path: Path, to: Path) -> None:
        """Give a file or folder another name, whose file, if there is one, it replaces."""
        path.replace(to)

    def link(self, path: Path, to: Path) -> None:
        """Give a file a second name."""
        os.link(path, to)

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        """Remove a file's name."""
        path.unlink(missing_ok=missing_ok)

    def make_folder(self, path: Path) -> None:
        """Make a folder, unless it is there."""
        path.mkdir(mode=0o700, exist_ok=True)

    def remove_tree(self, path: Path, *, ignore_errors: bool = False) -> None:
        """Remove a folder with all that is in it."""
        shutil.rmtree(path, ignore_errors=ignore_errors)


SYSTEM_DISK = Disk()
"""The disk of who is given none."""
