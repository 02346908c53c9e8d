"""A small file that names the segment written last, so that its loss is noticed.

Without the newest segment, those before it still make a journal, which ends earlier and looks whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.files import write_all
from optserve_server.persistence.journal.format import SEGMENT, CorruptionError, is_segment, segment_paths

NAME = "NEWEST_SEGMENT"


def set_newest(folder: Path, segment: Path | None, disk: Disk = SYSTEM_DISK) -> None:
    """Note durably which segment is the newest; None for none, before the last one is removed.

    A segment is noted once it is durable, and before anything that it holds is acknowledged.
    """
    note = folder / NAME
    if segment is None:
        disk.unlink(note, missing_ok=True)
    else:
        temporary = folder / f"{NAME}.tmp"
        descriptor = disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(descriptor, [f"{segment.name}\n".encode()], 0, disk)
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.rename(temporary, note)
    disk.sync_path(folder)


def newest_name(folder: Path) -> str | None:
    """The name that was noted; None if there is none."""
    note = folder / NAME
    return note.read_text(encoding="utf-8", errors="replace").strip() if note.exists() else None


def check_newest(folder: Path) -> None:
    """Raise CorruptionError if the segment that was noted is not there. Older servers noted none."""
    name = newest_name(folder)
    if name is None:
        return
    if not is_segment(name):
        raise CorruptionError(folder / NAME, 0, "it does not name a file of the journal")
    if name not in {path.name for path in segment_paths(folder)}:
        raise CorruptionError(folder / name, 0, "the newest file of the journal is missing")


def cut_at(folder: Path, path: Path, offset: int) -> int:
    """Cut a journal at a byte of one of its segments; returns the number of later segments, which are removed."""
    paths = segment_paths(folder)
    later = [other for other in paths if other.name > path.name]
    keeps_it = offset > SEGMENT.size
    left = [other for other in paths if other.name < path.name or (keeps_it and other == path)]
    set_newest(folder, left[-1] if left else None)
    for other in reversed(later):
        other.unlink()
    if keeps_it:
        os.truncate(path, offset)
    elif path in paths:
        path.unlink()
    SYSTEM_DISK.sync_path(folder)
    return len(later)
