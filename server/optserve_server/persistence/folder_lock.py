"""The lock of a data folder, and the check that the folder is still at its path."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optserve_server.persistence import snapshot
from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.journal import JournalError, segment_paths

logger = logging.getLogger(__name__)

LOCK = "LOCK"
UNCLEAN = "UNCLEAN"
"""Name of a file in the data folder. It exists while acknowledged steps may be missing from the folder."""


class FolderLock:
    """The lock of a data folder. While it is held, no other server can use the folder.

    Args:
        path: The folder; created if it does not exist.
        disk: The disk of the folder.

    Raises:
        JournalError: The folder cannot be used, or another server uses it.
    """

    def __init__(self, path: Path, disk: Disk = SYSTEM_DISK) -> None:
        self._disk = disk
        # A text, because a call with a text takes half the time of one with a Path, and there is one call per change.
        self._file = str(path / LOCK)
        if path.exists() and not path.is_dir():
            raise JournalError(f"The data folder {path} cannot be used: it is not a folder.")
        try:
            _create_durably(path, disk)
            self._descriptor = disk.open(path / LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise JournalError(f"The data folder {path} cannot be used: {error}.") from error
        _lock(self._descriptor, path, fcntl.LOCK_EX)
        status = os.fstat(self._descriptor)
        self._identity = (status.st_dev, status.st_ino)

    @property
    def is_in_place(self) -> bool:
        """Whether the folder is still at its path. False if somebody has deleted, moved or replaced it."""
        try:
            status = os.stat(self._file)  # noqa: PTH116
        except OSError:
            return False
        return status.st_ino == self._identity[1] and status.st_dev == self._identity[0]

    def release(self) -> None:
        """Release the lock, so that another server can use the folder."""
        self._disk.close(self._descriptor)


def _create_durably(path: Path, disk: Disk) -> None:
    """Create a folder and its parents unless they exist, and make their names durable against a power failure."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.make_folder(path)
    # The folder's own name is synced even if the folder exists: an earlier start may have ended before that sync.
    for folder in (path, *missing):
        try:
            disk.sync_path(folder.parent)
        except OSError as error:
            # Somebody else has created the folder for this server: in a parent that the server may not read, or on a
            # file system that syncs no folders, such as that of a container image in which the folder is mounted.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL):
                raise
            logger.debug("%s is not synced: %s", folder.parent, error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep servers out of a data folder for the length of a with-block. Writes nothing to the folder.

    Raises:
        JournalError: It is not a data folder, or cannot be read, or a server uses it.
    """
    descriptor = None
    try:
        if not (snapshot.paths(path) or segment_paths(path) or (path / LOCK).exists()):
            raise JournalError(f"{path} is not a data folder: it contains neither a journal nor a snapshot.")
        if (path / LOCK).exists():
            descriptor = os.open(path / LOCK, os.O_RDONLY)
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error}.") from error
    if descriptor is None:
        # A copy without the lock file, which no server has used.
        yield
        return
    _lock(descriptor, path, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise JournalError(f"Another server uses the data folder {path}; stop it or choose another one.") from error


def set_unclean(folder: Path, *, unclean: bool, disk: Disk = SYSTEM_DISK) -> None:
    """Create or delete the file `UNCLEAN`, durably."""
    marker = folder / UNCLEAN
    if unclean != marker.exists():
        if unclean:
            disk.create(marker).close()
        else:
            disk.unlink(marker)
        disk.sync_path(folder)
