"""Contents of files, sector by sector: which differ, and what a crash leaves of them."""

from __future__ import annotations

from .world import World

SECTOR_BYTES = 512


def different(before: bytes, after: bytes) -> set[int]:
    """The sectors in which two contents differ."""
    size = max(len(before), len(after))
    old, new = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    starts = range(0, size, SECTOR_BYTES)
    return {
        start // SECTOR_BYTES
        for start in starts
        if old[start : start + SECTOR_BYTES] != new[start : start + SECTOR_BYTES]
    }


def patched(before: bytes, after: bytes, kept: set[int]) -> bytes:
    """The later content, with some sectors as they were before."""
    mixed = bytearray(after)
    for sector in kept:
        start = sector * SECTOR_BYTES
        piece = before[start : start + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0")
        mixed[start : start + SECTOR_BYTES] = piece[: max(0, len(after) - start)]
    return bytes(mixed)


def after_crash(world: World, before: bytes, after: bytes, mood: str) -> bytes:
    """What a crash leaves of a file that was changed after its last sync."""
    if before == after or mood == "kept":
        return after
    if mood == "lost":
        return before
    if mood == "sectors":
        return patched(before, after, {each for each in sorted(different(before, after)) if world.chance(0.5)})
    # The first bytes that differ were written first, as a journal is.
    size = max(len(before), len(after))
    old, new = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    differing = next((position for position in range(size) if old[position] != new[position]), size)
    cut = world.random.randint(differing, size)
    return (new[:cut] + old[cut:])[: len(after)]
