"""A disk that is slow, fails, is full, loses what was not synced, and tears what was being written.

Files are real ones, in a folder of memory, so that whatever reads sees what was written. What is durable of them is
kept beside: their content and their names at the last sync. After a crash the folder is made anew of that, and of some
of what came since.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from optserve_server.persistence.disk import Buffer, Disk

from .sectors import SECTOR_BYTES, after_crash, different, patched
from .world import Killed, World


@dataclass(eq=False)
class File:
    """What is known of one file.

    Attributes:
        durable: Its content at the last sync.
        doubtful: Sectors that a failed sync has given up; they come to the disk only if they are written anew.
        last: Its content when its last name went.
        inode: Its number in the real file system, when it was opened last.
    """

    durable: bytes = b""
    doubtful: set[int] = field(default_factory=set)
    last: bytes = b""
    inode: int = 0


Names = dict[Path, File | None]
"""Files by path; None for a folder."""


@dataclass
class Change:
    """A change of names. It is durable when the folders are that it is in.

    Attributes:
        gone: Paths that are no longer there.
        made: Paths that are there.
        unsynced: Folders whose names have changed by it, and that were not synced since.
    """

    gone: list[Path]
    made: Names
    unsynced: set[Path] = field(default_factory=set)

    def apply(self, names: Names) -> None:
        """Make it once more, as far as that is possible."""
        for path in self.gone:
            names.pop(path, None)
        names.update(self.made)


@dataclass
class Faults:
    """How the disk behaves at the moment.

    Attributes:
        slowest_s: Longest time that a sync takes.
        failing: How often a sync or a write fails.
        full: Whether it has no room for new files.
        deadly: How often the process is killed at a call.
    """

    slowest_s: float = 0.01
    failing: float = 0.0
    full: bool = False
    deadly: float = 0.0


class SimulatedDisk(Disk):
    """The disk of one machine, on which one process after another runs.

    Args:
        world: Chooses.
        root: A folder that is there, in memory at best.

    Attributes:
        faults: See Faults.
    """

    def __init__(self, world: World, root: Path) -> None:
        self.world = world
        self.root = root
        self.faults = Faults()
        self._names: Names = {root: None}
        self._durable: Names = {root: None}
        self._changes: list[Change] = []
        self._open: dict[int, File] = {}
        # Those that nobody closes when the process ends; Python's own file objects close themselves.
        self._bare: set[int] = set()

    # What happens at each call.

    def _enter(self, what: str, *, fails: bool = False) -> None:
        world, faults = self.world, self.faults
        if world.current is None:
            return
        process = world.current.process
        if not process.alive:
            raise Killed
        if faults.deadly and world.chance(faults.deadly):
            world.log(lambda: f"{process.name} is killed at {what}")
            process.kill()
            raise Killed
        if fails and faults.failing and world.chance(faults.failing):
            world.log(lambda: f"the disk fails at {what}")
            raise OSError(errno.EIO, "Input/output error")
        world.preempt()

    def _change(self, folders: set[Path], gone: list[Path], made: Names) -> None:
        change = Change(gone, made, set(folders))
        change.apply(self._names)
        self._changes.append(change)

    def _register(self, descriptor: int, file: File) -> None:
        self._open[descriptor], file.inode = file, os.fstat(descriptor).st_ino

    def _file(self, descriptor: int) -> File | None:
        """The file with that descriptor; None for a folder."""
        file = self._open.get(descriptor)
        # Python's file objects close themselves, and the next file gets their number.
        if file is not None and file.inode != os.fstat(descriptor).st_ino:
            raise RuntimeError("A file is written or synced that was not opened through its Disk.")
        return file

    # Disk.

    def open(self, path: Path, flags: int) -> int:
        self._enter(f"open {path.name}", fails=bool(flags & os.O_CREAT))
        is_new = bool(flags & os.O_CREAT) and path not in self._names
        if is_new and self.faults.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        # Whoever only writes has it synced, for which it is read here.
        descriptor = super().open(path, flags & ~os.O_WRONLY | os.O_RDWR if flags & os.O_WRONLY else flags)
        if is_new:
            self._change({path.parent}, [], {path: File()})
        file = self._names.get(path)
        if file is not None:
            self._register(descriptor, file)
            if flags & os.O_TRUNC:
                file.doubtful.clear()
        self._bare.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        if self.world.current is not None and not self.world.current.process.alive:
            raise Killed
        self._open.pop(descriptor, None)
        self._bare.discard(descriptor)
        super().close(descriptor)

    def create(self, path: Path) -> BinaryIO:
        made = super().create(path)
        self._bare.discard(made.fileno())
        return made

    def reopen(self, path: Path) -> BinaryIO:
        made = super().reopen(path)
        self._bare.discard(made.fileno())
        return made

    def temporary(self, folder: Path, prefix: str) -> BinaryIO:
        self._enter("a temporary file", fails=True)
        if self.faults.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        made = super().temporary(folder, prefix)
        # It goes by itself; a crash may leave it, and its next server removes it.
        file = File()
        self._register(made.fileno(), file)
        self._change({folder}, [], {Path(made.name): file})
        return made

    def write(self, descriptor: int, parts: Sequence[Buffer], position: int) -> int:
        self._enter("write", fails=True)
        whole = b"".join(bytes(part) for part in parts)
        file = self._file(descriptor)
        if file is not None and file.doubtful:
            file.doubtful -= set(range(position // SECTOR_BYTES, (position + len(whole)) // SECTOR_BYTES + 1))
        taken = whole
        if self.faults.failing and self.world.chance(self.faults.failing):
            taken = whole[: max(1, self.world.random.randrange(len(whole) + 1))]
        if self.faults.deadly and self.world.chance(self.faults.deadly) and self.world.current is not None:
            os.pwrite(descriptor, whole[: self.world.random.randrange(len(whole) + 1)], position)
            self.world.log(lambda: "the server is killed within a write")
            self.world.current.process.kill()
            raise Killed
        return os.pwrite(descriptor, taken, position)

    def write_one(self, descriptor: int, data: Buffer, position: int) -> int:
        return self.write(descriptor, [data], position)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        self._enter("allocate", fails=True)
        if self.faults.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().allocate(descriptor, size_bytes)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        self._enter("truncate", fails=True)
        super().truncate(descriptor, size_bytes)

    def sync(self, descriptor: int) -> None:
        self._sync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        self._sync(descriptor)

    def _sync(self, descriptor: int) -> None:
        file = self._file(descriptor)
        # What is written while a sync is under way is not part of it.
        content = _content(descriptor) if file is not None else b""
        self._enter("sync")
        self._take_time()
        if file is None:
            return
        if self.faults.failing and self.world.chance(self.faults.failing):
            self.world.log(lambda: "a sync fails")
            file.doubtful |= different(file.durable, content)
            raise OSError(errno.EIO, "Input/output error")
        kept = {sector for sector in sorted(file.doubtful) if self.world.chance(0.5)}
        file.durable = patched(file.durable, content, kept) if kept else content
        self._enter("the end of a sync")

    def _take_time(self) -> None:
        if self.world.current is not None:
            self.world.sleep(self.world.random.uniform(0, self.faults.slowest_s), "the disk")

    def sync_path(self, path: Path) -> None:
        if path not in self._names or self._names[path] is not None:
            return super().sync_path(path)
        self._enter(f"sync of folder {path.relative_to(self.root)}", fails=True)
        self._take_time()
        self._enter("the end of a sync")
        for change in self._changes:
            change.unsynced.discard(path)
        return self._settle()

    def _settle(self) -> None:
        """Names that are durable need not be remembered as changes; in their order, as far as nothing is between."""
        while self._changes and not self._changes[0].unsynced:
            self._changes.pop(0).apply(self._durable)

    def rename(self, path: Path, to: Path) -> None:
        self._enter(f"rename to {to.name}", fails=True)
        self._keep(to)
        super().rename(path, to)
        gone = [known for known in self._names if known.is_relative_to(path)]
        moved = {to / known.relative_to(path): self._names[known] for known in gone}
        self._change({path.parent, to.parent}, gone, moved)

    def link(self, path: Path, to: Path) -> None:
        self._enter("link", fails=True)
        super().link(path, to)
        self._change({to.parent}, [], {to: self._names.get(path)})

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        self._enter(f"unlink {path.name}", fails=True)
        self._keep(path)
        super().unlink(path, missing_ok=missing_ok)
        self._change({path.parent}, [path], {})

    def _keep(self, path: Path) -> None:
        file = self._names.get(path)
        if file is not None and path.exists():
            file.last = path.read_bytes()

    def make_folder(self, path: Path) -> None:
        self._enter("mkdir", fails=True)
        super().make_folder(path)
        if path not in self._names:
            self._change({path.parent}, [], {path: None})

    def remove_tree(self, path: Path, *, ignore_errors: bool = False) -> None:
        self._enter("rmtree")
        for known in [known for known in self._names if known.is_relative_to(path)]:
            self._keep(known)
        super().remove_tree(path, ignore_errors=ignore_errors)
        for known in sorted((known for known in self._names if known.is_relative_to(path)), reverse=True):
            self._change({known.parent}, [known], {})

    # The end of a process.

    def crash(self, *, power: bool) -> None:
        """The process has been killed; with `power`, the machine as well, and what was not synced may be lost."""
        for descriptor in self._bare:
            os.close(descriptor)
        self._bare.clear()
        self._open.clear()
        if power:
            self._lose()
            self._changes.clear()

    def _lose(self) -> None:
        world = self.world
        current = {path: path.read_bytes() for path, file in self._names.items() if file and path.is_file()}
        content: dict[File, bytes] = {
            file: current[path] for path, file in self._names.items() if file and path in current
        }
        names = dict(self._durable)
        kept = world.random.randrange(len(self._changes) + 1)
        for position, change in enumerate(self._changes):
            # A later change may have been made durable, by a sync of its folder, and an earlier one of another not.
            if position < kept or not change.unsynced:
                change.apply(names)
        world.log(lambda: f"power is lost; {kept} of {len(self._changes)} changes of names are kept")
        shutil.rmtree(self.root)
        self._names = {}
        mood = world.random.choice(("lost", "kept", "prefix", "sectors"))
        for path in sorted(names):
            if path != self.root and path.parent not in self._names:
                continue
            file = names[path]
            if file is None:
                path.mkdir()
            else:
                now = content.get(file, file.last)
                file.durable = after_crash(world, file.durable, now, mood)
                file.doubtful.clear()
                path.write_bytes(file.durable)
            self._names[path] = file
        self._durable = dict(self._names)


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
