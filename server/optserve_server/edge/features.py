"""The optional parts of the contract that this server has, as far as they work on its host."""

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
        pb.FEATURE_STEP_SETTINGS,
        pb.FEATURE_ADDED_PARAMETERS,
        pb.FEATURE_WEIGHT_DECAY_FACTORS,
    }
)
"""Features that work on every host."""

_NEVER_RELEASED = frozenset({pb.FEATURE_WEIGHT_DECAY_KINDS})
"""Features that no server has. Their numbers stay taken."""

_NO_ROOM = (errno.ENOSPC, errno.ENOMEM)
"""Errors that do not count: the host has shared memory, but all of it is in use now."""

_PROBE_BYTES = 4096


@cache
def available() -> frozenset[int]:
    """The features that work on this host; found out once."""
    return _ANYWHERE | {pb.FEATURE_SHARED_MEMORY} if _has_shared_memory() else _ANYWHERE


def _has_shared_memory() -> bool:
    """Whether this process can make and attach segments; a kernel, a container's profile or a limit may forbid it."""
    if not sysv.host_id():
        return False
    try:
        number, made = sysv.create(_PROBE_BYTES)
        sysv.attach(number, made.nbytes)
    except OSError as error:
        if error.errno in _NO_ROOM:
            return True
        logger.info("shared memory does not work on this host: %s", error)
        return False
    return True


def host_id() -> str:
    """An id of the host; a client with the same id can share memory. Empty if this server shares none."""
    return sysv.host_id() if pb.FEATURE_SHARED_MEMORY in available() else ""


def check(feature: pb.Feature, field: str) -> None:
    """Raise FEATURE_UNAVAILABLE unless this server has a feature.

    Args:
        feature: The feature that a client asks for.
        field: Path of the request's field that asks for it.
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
    """Every feature of the contract that a server may have, available or not."""
    return [
        pb.FeatureStatus(feature=pb.Feature.Name(feature), available=feature in available())
        for feature in pb.Feature.values()
        if feature != pb.FEATURE_UNSPECIFIED and feature not in _NEVER_RELEASED
    ]
