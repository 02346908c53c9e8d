"""File descriptors: computes how many connections the server can accept, beside the descriptors that it needs."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

RESERVED = 256
"""Descriptors for the journal, snapshots, checkpoints, transfers and libraries."""

PER_STREAM = 3
"""Descriptors of a stream beside its connection: a control socket, the listener of the socket and a file."""

FEWEST_CONNECTIONS = 16


def room_for_connections(wanted: int, max_streams: int) -> int:
    """How many connections the server can accept; raises the soft limit of descriptors if needed.

    Args:
        wanted: Most connections that are wanted.
        max_streams: Streams that may be open at the same time.
    """
    reserved = RESERVED + PER_STREAM * max_streams
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _raised(soft, hard, wanted + reserved)
    room = limit - reserved
    if room >= wanted:
        return wanted
    # With a very low limit, half of the descriptors go to connections, and fewer than RESERVED to the rest.
    room = max(room, limit // 2, FEWEST_CONNECTIONS)
    logger.warning(
        "the system grants %d descriptors (RLIMIT_NOFILE), so the server accepts %d connections, not %d",
        limit,
        room,
        wanted,
    )
    return min(room, wanted)


def _raised(soft: int, hard: int, wanted: int) -> int:
    """Raise the soft limit to `wanted`, or as far as the system allows; returns the new limit."""
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
