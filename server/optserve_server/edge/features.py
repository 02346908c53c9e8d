"""Which parts of the contract this server has."""

from __future__ import annotations

from optserve._common import sysv
from optserve.v1 import service_pb2 as pb

AVAILABLE = frozenset(
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
    | ({pb.FEATURE_SHARED_MEMORY} if sysv.host_id() else set())
)


def statuses() -> list[pb.FeatureStatus]:
    """Every feature of the contract, available or not."""
    return [
        pb.FeatureStatus(feature=pb.Feature.Name(feature), available=feature in AVAILABLE)
        for feature in pb.Feature.values()
        if feature != pb.FEATURE_UNSPECIFIED
    ]
