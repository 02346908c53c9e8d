"""Where checkpoints are: in a folder, or in files without a name that end with the process."""

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
"""Checkpoints of a server without a data folder, each of which holds a file descriptor."""

Key = tuple[str, str]
"""Optimizer and tag."""


@dataclass(frozen=True)
class Limits:
    """What all checkpoints may take, those of deleted optimizers included.

    Attributes:
        max_files: Most of them.
        max_bytes: Of all files.
    """

    max_files: int = 1 << 62
    max_bytes: int = 1 << 62

    def check(self, sizes: Mapping[Key, int], key: Key, size_bytes: int) -> None:
        """Raise SERVER_FULL if there is no room for one more beside those of other keys."""
        before = sizes.get(key)
        count = len(sizes) + (before is None)
        used = sum(sizes.values()) - (before or 0)
        advice = "delete some, of deleted optimizers as well (optserve checkpoints list shows all)"
        if count > self.max_files:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"There are {len(sizes)} checkpoints, which is all that this server keeps; {advice}.",
                limit=self.max_files,
            )
        if used + size_bytes > self.max_bytes:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"The checkpoint takes {size_bytes} bytes; {max(0, self.max_bytes - used)} of {self.max_bytes} that "
                f"this server has for checkpoints are free; {advice}.",
                limit=self.max_bytes,
            )


class Store(Protocol):
    """Files by optimizer and tag, both of which are known to be harmless as names. Safe to use from several threads.

    Attributes:
        disk: Where its files are.
    """

    disk: Disk

    def temporary(self) -> BinaryIO:
        """A new file, which is gone once closed unless it is kept."""
        ...

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:
        """Give a temporary file its place, durably; raise FileExistsError if it is taken, unless `overwrite`."""
        ...

    def make_durable(self, optimizer: str) -> None:
        """Make sure that what is there of an optimizer is durable."""
        ...

    def check_capacity(self, optimizer: str, tag: str, size_bytes: int) -> None:
        """Raise SERVER_FULL if there is no room for a file. `keep` does so as well."""
        ...

    def keys(self) -> list[Key]:
        """All optimizers and tags, in order."""
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
        limits: Of all files.
        check_in_place: Called before something is written; raises what a call is refused with then.
        clock: The time.
        disk: Where the folder is.
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
        # No optimizer's name begins with a dot.
        for leftover in path.glob(f"{_TEMPORARY}*"):
            disk.unlink(leftover)

    def temporary(self) -> BinaryIO:  # noqa: D102 - see Store
        self._check_in_place()
        self.disk.make_folder(self._path)
        return self.disk.temporary(self._path, _TEMPORARY)

    def keep(self, file: BinaryIO, optimizer: str, tag: str, *, overwrite: bool) -> None:  # noqa: D102
        self.disk.sync(file.fileno())
        target = self._file(optimizer, tag)
        # A second name, because a temporary file removes its own when it is closed.
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
            # Somebody may have removed files by hand.
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
        """Make the names of a folder durable, and those of the folders that it is in."""
        for each in (folder, self._path, self._path.parent):
            self.disk.sync_path(each)


class TemporaryStore:
    """Files without a name in the system's folder for temporary ones. They end with the process, however that ends.

    Args:
        limits: Of all files, of which there are at most `MAX_TEMPORARY`.
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
            before = self._files.get((optimizer, tag))
            if before is not None and not overwrite:
                raise FileExistsError(tag)
            self._limits.check(self._sizes, (optimizer, tag), size_bytes)
            self._files[optimizer, tag] = _duplicate(file)
            self._sizes[optimizer, tag] = size_bytes
        if before is not None:
            before.close()

    def check_capacity(self, optimizer: str, tag: str, size_bytes: int) -> None:  # noqa: D102
        with self._lock:
            self._limits.check(self._sizes, (optimizer, tag), size_bytes)

    def keys(self) -> list[Key]:  # noqa: D102
        with self._lock:
            return sorted(self._files)

    def make_durable(self, optimizer: str) -> None:
        """Nothing is durable here."""

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
    """The same file under another descriptor."""
    return os.fdopen(os.dup(file.fileno()), "rb")
