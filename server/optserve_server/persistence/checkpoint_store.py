"""The stores of checkpoint files: in a folder, or in temporary files without a name that end with the process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.persistence.disk import SYSTEM_DISK, Disk

_SUFFIX = ".safetensors"
_TEMPORARY = ".new-"

MAX_TEMPORARY = 200
"""Most checkpoints of a server without a data folder. Each of them holds a file descriptor."""

Key = tuple[str, str]
"""(name of the optimizer, tag) of a checkpoint."""


@dataclass(frozen=True)
class Limits:
    """The limits on all checkpoints together, including those of deleted optimizers.

    Attributes:
        max_files: Most checkpoints.
        max_bytes: Most bytes of all files.
    """

    max_files: int = 1 << 62
    max_bytes: int = 1 << 62

    def check(self, sizes: Mapping[Key, int], key: Key, size_bytes: int) -> None:
        """Raise SERVER_FULL if a file would exceed a limit.

        Args:
            sizes: Bytes of the existing files.
            key: The key of the new file. It replaces an existing file of that key.
            size_bytes: Size of the new file.
        """
        replaced_bytes = sizes.get(key)
        count = len(sizes) + (replaced_bytes is None)
        used = sum(sizes.values()) - (replaced_bytes or 0)
        advice = "delete some, also of deleted optimizers (optserve checkpoints list shows all)"
        if count > self.max_files:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"There are {len(sizes)} checkpoints, and this server keeps no more; {advice}.",
                limit=self.max_files,
            )
        if used + size_bytes > self.max_bytes:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"The checkpoint takes {size_bytes} bytes. Of the {self.max_bytes} bytes that this server has for "
                f"checkpoints, {max(0, self.max_bytes - used)} are free; {advice}.",
                limit=self.max_bytes,
            )


class Store(Protocol):
    """Files by optimizer and tag. Safe to use from several threads.

    The caller has checked that name and tag are safe as names of files.

    Attributes:
        disk: The disk of the files.
    """

    disk: Disk

    def temporary(self) -> BinaryIO:
        """A new file. It is deleted when it is closed, unless `keep` was called."""
        ...

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:
        """Make a temporary file the file of an optimizer and tag, durably.

        Raises:
            FileExistsError: There is a file already, and `overwrite` is False.
            OptserveError: SERVER_FULL.
            OSError: The disk refuses.
        """
        ...

    def make_durable(self, optimizer: str) -> None:
        """Wait until all files of an optimizer are durable."""
        ...

    def check_capacity(self, optimizer: str, tag: str, size_bytes: int) -> None:
        """Raise SERVER_FULL if a file of that size would exceed a limit. `keep` checks that too."""
        ...

    def keys(self) -> list[Key]:
        """The keys of all files, sorted."""
        ...

    def tags(self, optimizer: str) -> list[str]:
        """The tags of an optimizer."""
        ...

    def open(self, optimizer: str, tag: str) -> BinaryIO:
        """Open a file for reading, or raise FileNotFoundError. It stays readable if it is removed."""
        ...

    def remove(self, optimizer: str, tag: str) -> None:
        """Remove a file, or raise FileNotFoundError."""
        ...


class FolderStore:
    """Files `OPTIMIZER/TAG.safetensors` in a folder that no other process changes.

    Args:
        path: The folder; created with the first file.
        limits: The limits on all files.
        check_in_place: Called before each change; raises OptserveError to refuse the change.
        clock: The time.
        disk: The disk of the folder.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits | None = None,
        check_in_place: Callable[[], None] = lambda: None,
        clock: Clock = SYSTEM,
        disk: Disk = SYSTEM_DISK,
    ) -> None:
        self._path = path
        self.disk = disk
        self._limits = limits or Limits()
        self._check_in_place = check_in_place
        self._lock = clock.lock()
        self._sizes = self._measure_files()
        # Temporary files of an earlier process. Their names begin with a dot, which no name of an optimizer does.
        for leftover in path.glob(f"{_TEMPORARY}*"):
            disk.unlink(leftover)

    def temporary(self) -> BinaryIO:  # noqa: D102 - see Store
        self._check_in_place()
        self.disk.make_folder(self._path)
        return self.disk.temporary(self._path, _TEMPORARY)

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:  # noqa: D102
        self.disk.sync(file.fileno())
        target = self._file(optimizer, tag)
        # A second name, because closing a temporary file deletes its first one.
        second = self._path / f"{Path(file.name).name}-kept"
        size_bytes = os.fstat(file.fileno()).st_size
        with self._lock:
            if not overwrite and target.exists():
                raise FileExistsError(target)
            self._check_capacity((optimizer, tag), size_bytes)
            try:
                self.disk.link(Path(file.name), second)
                self.disk.make_folder(target.parent)
                self.disk.rename(second, target)
            finally:
                self.disk.unlink(second, missing_ok=True)
            self._sizes[optimizer, tag] = size_bytes
            self._sync(target.parent)

    def make_durable(self, optimizer: str) -> None:  # noqa: D102
        self._sync(self._path / optimizer)

    def check_capacity(self, optimizer: str, tag: str, size_bytes: int) -> None:  # noqa: D102
        with self._lock:
            self._check_capacity((optimizer, tag), size_bytes)

    def _check_capacity(self, key: Key, size_bytes: int) -> None:
        try:
            self._limits.check(self._sizes, key, size_bytes)
        except OptserveError:
            # Measured anew, because somebody may have removed files by hand.
            self._sizes = self._measure_files()
            self._limits.check(self._sizes, key, size_bytes)

    def _measure_files(self) -> dict[Key, int]:
        return {
            (path.parent.name, path.name.removesuffix(_SUFFIX)): path.stat().st_size
            for path in self._path.glob(f"*/*{_SUFFIX}")
        }

    def keys(self) -> list[Key]:  # noqa: D102
        with self._lock:
            return sorted(self._sizes)

    def tags(self, optimizer: str) -> list[str]:  # noqa: D102
        return [path.name.removesuffix(_SUFFIX) for path in (self._path / optimizer).glob(f"*{_SUFFIX}")]

    def open(self, optimizer: str, tag: str) -> BinaryIO:  # noqa: D102
        return self._file(optimizer, tag).open("rb")

    def remove(self, optimizer: str, tag: str) -> None:  # noqa: D102
        self._check_in_place()
        path = self._file(optimizer, tag)
        with self._lock:
            self._sizes.pop((optimizer, tag), None)
            self.disk.unlink(path)
            self._sync(path.parent)

    def _file(self, optimizer: str, tag: str) -> Path:
        return self._path / optimizer / f"{tag}{_SUFFIX}"

    def _sync(self, folder: Path) -> None:
        """Make the names in a folder and in its two parents durable."""
        for path in (folder, self._path, self._path.parent):
            self.disk.sync_path(path)


class TemporaryStore:
    """Files without a name in the system's temporary folder. They end with the process, even if it is killed.

    Args:
        limits: The limits on all files. At most `MAX_TEMPORARY` files are kept in any case.
        clock: The time.
    """

    def __init__(self, limits: Limits | None = None, clock: Clock = SYSTEM) -> None:
        limits = limits or Limits()
        self._limits = replace(limits, max_files=min(limits.max_files, MAX_TEMPORARY))
        self._lock = clock.lock()
        self.disk = SYSTEM_DISK
        self._files: dict[Key, BinaryIO] = {}
        self._sizes: dict[Key, int] = {}

    def temporary(self) -> BinaryIO:  # noqa: D102 - see Store
        return tempfile.TemporaryFile()

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:  # noqa: D102
        size_bytes = os.fstat(file.fileno()).st_size
        with self._lock:
            replaced = self._files.get((optimizer, tag))
            if replaced is not None and not overwrite:
                raise FileExistsError(tag)
            self._limits.check(self._sizes, (optimizer, tag), size_bytes)
            self._files[optimizer, tag] = _duplicate(file)
            self._sizes[optimizer, tag] = size_bytes
        if replaced is not None:
            replaced.close()

    def check_capacity(self, optimizer: str, tag: str, size_bytes: int) -> None:  # noqa: D102
        with self._lock:
            self._limits.check(self._sizes, (optimizer, tag), size_bytes)

    def keys(self) -> list[Key]:  # noqa: D102
        with self._lock:
            return sorted(self._files)

    def make_durable(self, optimizer: str) -> None:
        """Does nothing: no file is durable here."""

    def tags(self, optimizer: str) -> list[str]:  # noqa: D102
        with self._lock:
            return [tag for name, tag in self._files if name == optimizer]

    def open(self, optimizer: str, tag: str) -> BinaryIO:  # noqa: D102
        with self._lock:
            if (optimizer, tag) not in self._files:
                raise FileNotFoundError(tag)
            return _duplicate(self._files[optimizer, tag])

    def remove(self, optimizer: str, tag: str) -> None:  # noqa: D102
        with self._lock:
            if (optimizer, tag) not in self._files:
                raise FileNotFoundError(tag)
            self._files.pop((optimizer, tag)).close()
            del self._sizes[optimizer, tag]


def _duplicate(file: BinaryIO) -> BinaryIO:
    """The same file with another descriptor."""
    return os.fdopen(os.dup(file.fileno()), "rb")
