"""Adds parameters to an optimizer that lives."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from optserve import settings
from optserve._common import wire
from optserve._resources import replies
from optserve._resources.features import has_feature
from optserve._resources.new_optimizer import ArrayLike, parameter_messages, values_of
from optserve._resources.parameter_table import ParameterTable
from optserve._resources.transfer import CHUNK_BYTES, with_retries
from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve._values.arrays import check_mapping
from optserve._values.settings_messages import check_kinds, group_messages
from optserve._values.step_settings import KnownSettings
from optserve.errors import FeatureUnavailableError, InvalidArgumentError
from optserve.state import TensorSpec
from optserve.v1 import additions_pb2, optimizer_pb2, service_pb2


class Addition:
    """Parameters for an optimizer, checked. `send` adds them.

    Args:
        name: Resource name of the optimizer.
        known: What is known of its settings.
        hosted: Whether the server holds the parameters.
        params: See `optserve.Optimizer.add_parameters`.
        groups: See `optserve.Optimizer.add_parameters`.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """

    def __init__(
        self,
        name: str,
        known: KnownSettings,
        params: Mapping[str, ArrayLike | TensorSpec],
        groups: Sequence[settings.Group],
        *,
        hosted: bool,
    ) -> None:
        check_mapping(params, "params", "dict(layer.named_parameters())")
        check_kinds(None, None, None, groups, None)
        if not params:
            raise InvalidArgumentError("Add at least one parameter.")
        # One id for all tries.
        self._first = additions_pb2.AddParametersRequest(name=name, request_id=str(uuid.uuid4()))
        try:
            self._first.parameters.extend(parameter_messages(params))
            self._first.groups.extend(group_messages(groups, known.method, fixed=known.fixed))
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"Parameters cannot be added from these arguments: {error}") from error
        self._arrays = self._values(params) if hosted else []

    def _values(self, params: Mapping[str, ArrayLike | TensorSpec]) -> list[np.ndarray]:
        """X of the new parameters, in their order."""
        values = values_of(params)
        if not values:
            raise InvalidArgumentError(
                "The server holds the parameters of this optimizer, so pass the new ones with their values, as arrays."
            )
        table = ParameterTable(self._first.name, self._first.parameters, takes_curvature=False)
        return [table.contiguous(index, values[name], "parameter") for index, name in enumerate(table.names)]

    def send(self, connection: Connection, lineage: str, patience: Patience) -> optimizer_pb2.Optimizer:
        """Add the parameters, exactly once, and return the message of the optimizer.

        Args:
            connection: To the server.
            lineage: The lineage that the optimizer must have.
            patience: How long to wait.

        Raises:
            FeatureUnavailableError: The server is too old.
            OptserveError: The server has refused the call, or has not answered in time.
        """
        if not has_feature(connection, service_pb2.FEATURE_ADDED_PARAMETERS, max(patience.left_s, 0.001)):
            raise FeatureUnavailableError("This server is too old to add parameters to an optimizer.")
        self._first.lineage = lineage
        answer = with_retries(
            connection, lambda left_s: connection.add_parameters(self._messages(), left_s), max(patience.left_s, 0.001)
        )
        return replies.added(answer.optimizer, self._first.name, self._first.parameters)

    def _messages(self) -> Iterator[bytes]:
        yield wire.encode(self._first)
        for tensor, array in enumerate(self._arrays):
            data = array.reshape(-1).view(np.uint8).data
            for offset in range(0, len(data), CHUNK_BYTES):
                header = additions_pb2.AddParametersRequest()
                header.chunk.tensor, header.chunk.offset = tensor, offset
                yield wire.encode(header, data[offset : offset + CHUNK_BYTES])
        last = additions_pb2.AddParametersRequest()
        last.commit.SetInParent()
        yield wire.encode(last)
