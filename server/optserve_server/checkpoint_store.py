"""Where checkpoints are: in a folder, or in files without a name that end with the process."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO, Protocol

from optserve_server.journal import sync_folder

_SUFFIX = ".safetensors"
_TEMPORARY = ".new-"

MAX_TEMPORARY = 200
"""Checkpoints of a server without a data folder, each of which holds a file descriptor."""


class Store(Protocol):
    """Files by optimizer and tag, both of which are known to be harmless as names. Safe to use from several threads."""

    def temporary(self) -> BinaryIO:
        """A new file, which is gone once closed unless it is kept."""
        ...

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:
        """Give a temporary file its place, durably; raise FileExistsError if it is taken, unless `overwrite`."""
        ...

    def settle(self, optimizer: str) -> None:
        """Make sure that what is there of an optimizer is durable."""
        ...

    def tags(self, optimizer: str) -> list[str]:
        """The tags of an optimizer."""
        ...

    def open(self, optimizer: str, tag: str) -> BinaryIO:
        """A file for reading, which stays readable if it is removed; or raise FileNotFoundError."""
        ...

    def remove(self, optimizer: str, tag: str) -> None:
        """Remove a file, or raise FileNotFoundError."""
        ...


class FolderStore:
    """Files `OPTIMIZER/TAG.safetensors` in a folder that no other process changes.

    Args:
        path: The folder; made when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        # No optimizer's name begins with a dot.
        for leftover in path.glob(f"{_TEMPORARY}*"):
            leftover.unlink()

    def temporary(self) -> BinaryIO:  # noqa: D102 - see Store
        self._path.mkdir(exist_ok=True)
        return tempfile.NamedTemporaryFile(dir=self._path, prefix=_TEMPORARY)  # pyright: ignore[reportReturnType]

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:  # noqa: D102
        os.fsync(file.fileno())
        target = self._file(optimizer, tag)
        # A second name, because a temporary file removes its own when it is closed.
        second = self._path / f"{Path(file.name).name}-kept"
        with self._lock:
            if not overwrite and target.exists():
                raise FileExistsError(target)
            try:
                os.link(file.name, second)
                target.parent.mkdir(exist_ok=True)
                second.replace(target)
            finally:
                second.unlink(missing_ok=True)
            self._sync(target.parent)

    def settle(self, optimizer: str) -> None:  # noqa: D102
        self._sync(self._path / optimizer)

    def tags(self, optimizer: str) -> list[str]:  # noqa: D102
        return [path.name.removesuffix(_SUFFIX) for path in (self._path / optimizer).glob(f"*{_SUFFIX}")]

    def open(self, optimizer: str, tag: str) -> BinaryIO:  # noqa: D102
        return self._file(optimizer, tag).open("rb")

    def remove(self, optimizer: str, tag: str) -> None:  # noqa: D102
        path = self._file(optimizer, tag)
        with self._lock:
            path.unlink()
            self._sync(path.parent)

    def _file(self, optimizer: str, tag: str) -> Path:
        return self._path / optimizer / f"{tag}{_SUFFIX}"

    def _sync(self, folder: Path) -> None:
        """Make the names of a folder durable, and those of the folders that it is in."""
        for each in (folder, self._path, self._path.parent):
            sync_folder(each)


class TemporaryStore:
    """Files without a name in the system's folder for temporary ones. They end with the process, however that ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str], BinaryIO] = {}

    def temporary(self) -> BinaryIO:  # noqa: D102 - see Store
        return tempfile.TemporaryFile()

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:  # noqa: D102
        with self._lock:
            before = self._files.get((optimizer, tag))
            if before is not None and not overwrite:
                raise FileExistsError(tag)
            if before is None and len(self._files) >= MAX_TEMPORARY:
                raise OSError(errno.ENOSPC, f"a server without a data folder keeps {MAX_TEMPORARY} checkpoints")
            self._files[optimizer, tag] = _again(file)
        if before is not None:
            before.close()

    def settle(self, optimizer: str) -> None:
        """Nothing is durable here."""

    def tags(self, optimizer: str) -> list[str]:  # noqa: D102
        with self._lock:
            return [tag for name, tag in self._files if name == optimizer]

    def open(self, optimizer: str, tag: str) -> BinaryIO:  # noqa: D102
        with self._lock:
            if (optimizer, tag) not in self._files:
                raise FileNotFoundError(tag)
            return _again(self._files[optimizer, tag])

    def remove(self, optimizer: str, tag: str) -> None:  # noqa: D102
        with self._lock:
            if (optimizer, tag) not in self._files:
                raise FileNotFoundError(tag)
            self._files.pop((optimizer, tag)).close()


def _again(file: BinaryIO) -> BinaryIO:
    """The same file under another descriptor."""
    return os.fdopen(os.dup(file.fileno()), "rb")
