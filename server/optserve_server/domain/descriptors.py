"""File descriptors: as many as connections may take, beside those that the server cannot do without."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

RESERVED = 256
"""For the journal, snapshots, checkpoints, transfers and libraries."""

PER_STREAM = 3
"""A stream may have a control socket, its listener and a file beside its connection."""

FEWEST_CONNECTIONS = 16


def room_for_connections(wanted: int, max_streams: int) -> int:
    """How many connections there is room for, up to those wanted; the soft limit is raised for them if need be.

    Args:
        wanted: Most that are to be let in.
        max_streams: Streams that may be open beside.
    """
    reserved = RESERVED + PER_STREAM * max_streams
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _raised(soft, hard, wanted + reserved)
    room = limit - reserved
    if room >= wanted:
        return wanted
    # Where even what is reserved is more than half, both get by with less.
    room = max(room, limit // 2, FEWEST_CONNECTIONS)
    logger.warning(
        "the system grants %d descriptors (RLIMIT_NOFILE), so %d connections are let in, not %d",
        limit,
        room,
        wanted,
    )
    return min(room, wanted)


def _raised(soft: int, hard: int, wanted: int) -> int:
    """The soft limit, after it was raised as far as that is wanted and allowed."""
    if soft == resource.RLIM_INFINITY:
        return wanted
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if target <= soft:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (ValueError, OSError) as error:
        logger.warning("the limit of descriptors cannot be raised from %d to %d: %s", soft, target, error)
        return soft
    return target
