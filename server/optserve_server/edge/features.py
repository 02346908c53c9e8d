"""Which parts of the contract this server has: all that are written here, as far as the host lets them work."""

from __future__ import annotations

import errno
import logging
from functools import cache

from optserve._common import sysv
from optserve.v1 import service_pb2 as pb
from optserve_server.domain.errors import OptserveError, Reason

logger = logging.getLogger(__name__)

_ANYWHERE = frozenset(
    {
        pb.FEATURE_UNARY_STEPS,
        pb.FEATURE_STREAMED_STEPS,
        pb.FEATURE_LIVE_UPDATES,
        pb.FEATURE_CHECKPOINTS,
        pb.FEATURE_STATE_TRANSFER,
        pb.FEATURE_IMPORTED_SETTINGS,
        pb.FEATURE_HALF_PRECISION_WIRE,
        pb.FEATURE_CURVATURE,
        pb.FEATURE_SCHEDULES,
        pb.FEATURE_CLIPPING,
        pb.FEATURE_PARAMETER_GROUPS,
        pb.FEATURE_STATISTICS,
        pb.FEATURE_HOSTED_MODE,
        pb.FEATURE_WORKERS,
    }
)
"""What works on every host."""

_NO_ROOM = (errno.ENOSPC, errno.ENOMEM)
"""Errors that pass: the host has shared memory, and has lent all of it."""

_PROBE_BYTES = 4096


@cache
def available() -> frozenset[int]:
    """What works on this host, which is looked at once."""
    return _ANYWHERE | {pb.FEATURE_SHARED_MEMORY} if _has_shared_memory() else _ANYWHERE


def _has_shared_memory() -> bool:
    """Whether segments can be made and used; a kernel, a container's profile or a limit may forbid them."""
    if not sysv.host_id():
        return False
    try:
        number, made = sysv.create(_PROBE_BYTES)
        sysv.attach(number, made.nbytes)
    except OSError as error:
        if error.errno in _NO_ROOM:
            return True
        logger.info("no shared memory with clients: %s", error)
        return False
    return True


def host_id() -> str:
    """By which a client recognizes a server with which it can share memory; empty where it cannot."""
    return sysv.host_id() if pb.FEATURE_SHARED_MEMORY in available() else ""


def check(feature: pb.Feature, field: str) -> None:
    """Raise FEATURE_UNAVAILABLE unless this server has a feature.

    Args:
        feature: What a client has asked for.
        field: Of its request, by which it has.
    """
    if feature not in available():
        name = pb.Feature.Name(feature)
        raise OptserveError(
            Reason.FEATURE_UNAVAILABLE,
            f"This server does not have {name} on its host; GetServerInfo says what it has.",
            field=field,
            feature=name,
        )


def statuses() -> list[pb.FeatureStatus]:
    """Every feature of the contract, available or not."""
    return [
        pb.FeatureStatus(feature=pb.Feature.Name(feature), available=feature in available())
        for feature in pb.Feature.values()
        if feature != pb.FEATURE_UNSPECIFIED
    ]
