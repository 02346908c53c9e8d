"""A small file that names the newest segment of a journal, so that the loss of that segment is noticed.

Without its newest segment a journal ends earlier, but still looks whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.files import write_all
from optserve_server.persistence.journal.format import SEGMENT_HEADER, CorruptionError, is_segment, segment_paths

FILE_NAME = "NEWEST_SEGMENT"


def note_newest_segment(folder: Path, segment: Path | None, disk: Disk = SYSTEM_DISK) -> None:
    """Write down, durably, which segment is the newest.

    Call it once a new segment is durable, and before a record in it is acknowledged.

    Args:
        folder: The folder of the journal.
        segment: The newest segment; None before the last segment is removed.
        disk: The disk of the folder.
    """
    note = folder / FILE_NAME
    if segment is None:
        disk.unlink(note, missing_ok=True)
    else:
        temporary = folder / f"{FILE_NAME}.tmp"
        descriptor = disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(descriptor, [f"{segment.name}\n".encode()], 0, disk)
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.rename(temporary, note)
    disk.sync_path(folder)


def noted_segment(folder: Path) -> str | None:
    """The name of the segment that is written down as the newest; None if no segment is."""
    note = folder / FILE_NAME
    return note.read_text(encoding="utf-8", errors="replace").strip() if note.exists() else None


def check_newest_segment(folder: Path) -> None:
    """Raise CorruptionError if the segment that is written down as the newest is missing.

    Servers of earlier versions did not write it down. Then there is nothing to check.
    """
    name = noted_segment(folder)
    if name is None:
        return
    if not is_segment(name):
        raise CorruptionError(folder / FILE_NAME, 0, "it does not name a file of the journal")
    if name not in {path.name for path in segment_paths(folder)}:
        raise CorruptionError(folder / name, 0, "the newest file of the journal is missing")


def truncate_journal(folder: Path, path: Path, offset: int) -> int:
    """Remove everything from a byte of a segment on: the end of that segment, and all later segments.

    Args:
        folder: The folder of the journal.
        path: The segment.
        offset: Byte of the segment.

    Returns:
        The number of later segments that were removed.
    """
    paths = segment_paths(folder)
    later = [other for other in paths if other.name > path.name]
    has_records = offset > SEGMENT_HEADER.size
    remaining = [other for other in paths if other.name < path.name or (has_records and other == path)]
    note_newest_segment(folder, remaining[-1] if remaining else None)
    for other in reversed(later):
        other.unlink()
    if has_records:
        os.truncate(path, offset)
    elif path in paths:
        path.unlink()
    SYSTEM_DISK.sync_path(folder)
    return len(later)
