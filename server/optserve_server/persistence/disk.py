"""The calls that change files and make them durable. The simulation replaces them by a disk that fails and loses data.

Calls that only read are not here. They see what was written, durable or not.
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
    """The disk of the operating system. Only their owner may read the files and folders that it creates.

    Every method raises OSError if the disk refuses. The disk may then have done a part of what was asked.
    """

    # Each method looks up its function of `os` when it is called, so that a test can replace that function.

    def open(self, path: Path, flags: int) -> int:
        """Open a file and return its descriptor."""
        return os.open(path, flags, 0o600)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def create(self, path: Path) -> BinaryIO:
        """Create a file, or empty an existing one, and open it for reading and writing."""
        return os.fdopen(self.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "w+b")

    def reopen(self, path: Path) -> BinaryIO:
        """Open a file that exists, to change a part of it."""
        return os.fdopen(self.open(path, os.O_RDWR), "r+b")

    def temporary(self, folder: Path, prefix: str) -> BinaryIO:
        """Create a file in a folder, which is deleted when it is closed."""
        return tempfile.NamedTemporaryFile(dir=folder, prefix=prefix)  # pyright: ignore[reportReturnType]

    def write(self, descriptor: int, parts: Sequence[Buffer], position: int) -> int:
        """Write parts, one after the other, from a position on. Returns the bytes written, which may be fewer."""
        return os.pwritev(descriptor, parts, position)

    def write_one(self, descriptor: int, data: Buffer, position: int) -> int:
        """Write bytes from a position on. Returns the number of bytes written, which may be less."""
        return os.pwrite(descriptor, data, position)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """Reserve disk space, so that the file has that size, or raise OSError."""
        os.posix_fallocate(descriptor, 0, size_bytes)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Change the size of a file."""
        os.ftruncate(descriptor, size_bytes)

    def sync(self, descriptor: int) -> None:
        """Make a file durable, with its size and times (fsync). Of a folder: make the names in it durable."""
        os.fsync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        """Make the content of a file durable, with its size (fdatasync)."""
        os.fdatasync(descriptor)

    def sync_path(self, path: Path) -> None:
        """Open a file or folder, and `sync` it."""
        descriptor = self.open(path, os.O_RDONLY)
        try:
            self.sync(descriptor)
        finally:
            self.close(descriptor)

    def rename(self, path: Path, to: Path) -> None:
        """Rename a file or folder. A file that has the new name is replaced."""
        path.replace(to)

    def link(self, path: Path, to: Path) -> None:
        """Give a file a second name (a hard link)."""
        os.link(path, to)

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        """Delete a file. Processes that have opened it keep it."""
        path.unlink(missing_ok=missing_ok)

    def make_folder(self, path: Path) -> None:
        """Create a folder, unless it exists."""
        path.mkdir(mode=0o700, exist_ok=True)

    def remove_tree(self, path: Path, *, ignore_errors: bool = False) -> None:
        """Delete a folder and everything in it."""
        shutil.rmtree(path, ignore_errors=ignore_errors)


SYSTEM_DISK = Disk()
"""The default disk."""
