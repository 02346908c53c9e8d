"""Who may use a data folder, and whether it is still where it was."""

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
"""A file that says that steps which had been acknowledged may be missing here."""


class FolderLock:
    """Keeps every other server out of a data folder, which is made if need be, until it is released.

    Raises:
        JournalError: The folder cannot be used, or another server uses it.
    """

    def __init__(self, path: Path, disk: Disk = SYSTEM_DISK) -> None:
        self._disk = disk
        # As text, which is twice as fast at each change.
        self._file = str(path / LOCK)
        try:
            _make_durably(path, disk)
            self._descriptor = disk.open(path / LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise JournalError(f"The data folder {path} cannot be used: {error}.") from error
        _lock(self._descriptor, path, fcntl.LOCK_EX)
        status = os.fstat(self._descriptor)
        self._identity = (status.st_dev, status.st_ino)

    @property
    def is_in_place(self) -> bool:
        """Whether the folder has been neither deleted nor moved away nor replaced since, which nobody is kept from."""
        try:
            status = os.stat(self._file)  # noqa: PTH116
        except OSError:
            return False
        return status.st_ino == self._identity[1] and status.st_dev == self._identity[0]

    def release(self) -> None:
        """Let others in."""
        self._disk.close(self._descriptor)


def _make_durably(path: Path, disk: Disk) -> None:
    """Make a folder and those that it is in, unless they are there, so that a power failure does not take them away."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.make_folder(path)
    # That of the folder itself also where it is there: an earlier start may have ended before it came to that.
    for folder in (path, *missing):
        try:
            disk.sync_path(folder.parent)
        except OSError as error:
            # Somebody else has made the folder for this server, in one that may not be read, or on a file system that
            # syncs no folders: that of an image, for example, in which the data folder is where another is mounted.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL):
                raise
            logger.debug("%s is not synced: %s", folder.parent, error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep servers out of a data folder for the length of a with-block, writing nothing there.

    Raises:
        JournalError: It is none, cannot be read, or a server uses it.
    """
    descriptor = None
    try:
        if not (snapshot.paths(path) or segment_paths(path) or (path / LOCK).exists()):
            raise JournalError(f"{path} is no data folder: there is neither a journal nor a snapshot in it.")
        if (path / LOCK).exists():
            descriptor = os.open(path / LOCK, os.O_RDONLY)
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error}.") from error
    if descriptor is None:
        # A copy, which no server has ever used.
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
    """Make or remove the file that says so, durably."""
    marker = folder / UNCLEAN
    if unclean != marker.exists():
        if unclean:
            disk.create(marker).close()
        else:
            disk.unlink(marker)
        disk.sync_path(folder)
