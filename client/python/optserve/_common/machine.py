"""How many cores and how much memory this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
OWN_PAGES = Path("/proc/self/statm")


def usable_cores(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Cores that this process may run on, or fewer if a quota, such as that of a container, gives it less time.

    A part of a core counts as a whole one: two threads at a quota of 1.5 cores are faster than one.

    Args:
        cgroups: Where the kernel shows control groups, of version 1 or 2.
        own_cgroups: The file that names the groups of this process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", cgroups, own_cgroups):
        quota = _quota(folder)
        if quota is not None:
            cores = min(cores, max(1, math.ceil(quota)))
    return cores


def usable_bytes(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Memory that this process may use: the machine's, or that of a group around it, such as a container's, if less.

    Args:
        cgroups: Where the kernel shows control groups, of version 1 or 2.
        own_cgroups: The file that names the groups of this process.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups("memory", cgroups, own_cgroups):
        # Without a limit, version 2 says "max", and version 1 a number beyond any machine.
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def own_bytes(own_pages: Path = OWN_PAGES) -> int:
    """Bytes of this process that only the process itself can free; 0 if the system does not say.

    Args:
        own_pages: The file with the numbers of pages.
    """
    # Numbers of pages: all, those in memory, and those in memory that files or other processes share.
    words = _read(own_pages).split()
    if len(words) < 3 or not all(word.isdecimal() for word in words):
        return 0
    return (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE")


def _groups(controller: str, cgroups: Path, own_cgroups: Path) -> Iterator[Path]:
    """The folders of the groups that limit this process: its own group, and the groups around it.

    Within a container the kernel usually shows the own group as the root.
    """
    yield cgroups
    yield cgroups / controller
    # Lines such as "0::/user.slice" of version 2, or "4:cpu,cpuacct:/docker/1f" of version 1.
    for line in _read(own_cgroups).splitlines():
        _, controllers, name = line.split(":", 2) if line.count(":") >= 2 else ("", "", "/")
        if controllers and controller not in controllers.split(","):
            continue
        base = cgroups / controller if controllers else cgroups
        parts = [part for part in name.split("/") if part and part != ".."]
        for count in range(len(parts), 0, -1):
            yield base.joinpath(*parts[:count])


def _quota(folder: Path) -> float | None:
    """Number of cores, maybe a fraction, that a group may use; None without a limit."""
    # Version 2: "50000 100000" or "max 100000"; version 1 has two files, and -1 for no limit.
    words = _read(folder / "cpu.max").split() or (
        _read(folder / "cpu.cfs_quota_us").split() + _read(folder / "cpu.cfs_period_us").split()
    )
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    """A file's text; empty if there is no such file, or this process may not read it."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
