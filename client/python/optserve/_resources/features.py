"""Asks which optional parts of the contract a server has."""

from __future__ import annotations

from optserve._rpc.connection import Connection
from optserve.errors import FeatureUnavailableError
from optserve.settings import WeightDecay
from optserve.v1 import service_pb2


def has_feature(connection: Connection, feature: service_pb2.Feature, timeout_s: float | None = None) -> bool:
    """Whether the server has a feature, by one call with that time-out; `ClientConfig.timeout_s` by default."""
    info = connection.call(connection.stub.GetServerInfo, service_pb2.GetServerInfoRequest(), timeout_s=timeout_s)
    return any(item.feature == feature and item.available for item in info.features)


def check_weight_decay(connection: Connection, weight_decay: object) -> None:
    """Ask the server whether it knows the kind of a weight decay. Older ones would take it for the fixed kind.

    Raises:
        FeatureUnavailableError: It does not.
    """
    if isinstance(weight_decay, WeightDecay) and not has_feature(connection, service_pb2.FEATURE_WEIGHT_DECAY_FACTORS):
        raise FeatureUnavailableError(
            f"This server is too old for {weight_decay!r}; it knows weight_decay only as a number, the part of x that "
            "each step takes off."
        )
