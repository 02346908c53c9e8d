"""Which parts of the contract this server has."""

from __future__ import annotations

from optserve import sysv
from optserve.v1 import service_pb2 as pb
from optserve_server.errors import OptserveError, Reason

AVAILABLE = frozenset(
    {
        pb.FEATURE_UNARY_STEPS,
        pb.FEATURE_STREAMED_STEPS,
        pb.FEATURE_LIVE_UPDATES,
        pb.FEATURE_CHECKPOINTS,
        pb.FEATURE_STATE_TRANSFER,
        pb.FEATURE_HALF_PRECISION_WIRE,
        pb.FEATURE_CURVATURE,
        pb.FEATURE_SCHEDULES,
        pb.FEATURE_CLIPPING,
        pb.FEATURE_PARAMETER_GROUPS,
        pb.FEATURE_STATISTICS,
        pb.FEATURE_HOSTED_MODE,
    }
    | ({pb.FEATURE_SHARED_MEMORY} if sysv.host_id() else set())
)

UNAVAILABLE_METHODS = {
    "ReportWorker": pb.FEATURE_WORKERS,
}
"""Methods of the service that answer UNIMPLEMENTED, with the feature that they belong to."""


def statuses() -> list[pb.FeatureStatus]:
    """Every feature of the contract, available or not."""
    return [
        pb.FeatureStatus(feature=pb.Feature.Name(feature), available=feature in AVAILABLE)
        for feature in pb.Feature.values()
        if feature != pb.FEATURE_UNSPECIFIED
    ]


def unavailable(feature: pb.Feature.ValueType, field: str = "") -> OptserveError:
    """The error for a call or field of a feature that this server lacks."""
    name = pb.Feature.Name(feature).removeprefix("FEATURE_")
    return OptserveError(
        Reason.FEATURE_UNAVAILABLE,
        f"This server does not have {name.lower().replace('_', ' ')}; GetServerInfo lists what it has.",
        field=field,
        feature=name,
    )
