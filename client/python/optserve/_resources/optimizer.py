"""An optimizer on the server, without its steps: its settings, statistics, checkpoints and state."""

from __future__ import annotations

import abc
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import TypeVar, overload

import numpy as np

from optserve import _reasons, algorithms, settings
from optserve._common.wire import WIRE_DTYPES
from optserve._resources import replies
from optserve._resources.checkpoints import checkpoint_from, delete_checkpoint, list_checkpoints
from optserve._resources.parameter_table import ParameterTable
from optserve._resources.transfer import export_state, import_state, pull_parameters, push_parameters
from optserve._rpc.connection import Connection
from optserve._steps.updates import ReplyLayouts, Updates
from optserve._values.settings_messages import (
    Changes,
    check_is_same,
    clipping_from,
    consistency_from,
    groups_from,
    schedule_from,
    update_request,
    weight_decay_from,
)
from optserve._values.step_settings import KnownSettings
from optserve.errors import FailedPreconditionError
from optserve.optimizer_info import PREFIX
from optserve.state import Checkpoint, HostedParameters, OptimizerState, Progress, no_progress
from optserve.statistics import QUANTILES, Statistics, StatisticsRequest, statistics_from
from optserve.v1 import checkpoints_pb2, optimizer_pb2, replicas_pb2, service_pb2, statistics_pb2

_Response = TypeVar("_Response")

MAX_STEP = 1 << 62
"""More steps than any optimizer can have made."""


class Resource(abc.ABC):
    """The part of `optserve.Optimizer` without steps.

    Attributes:
        name: The name that `create_optimizer` got.
        hosted: Whether the server holds the parameters as well.
    """

    def __init__(
        self, connection: Connection, message: optimizer_pb2.Optimizer, wire_type: optimizer_pb2.DataType
    ) -> None:
        self._wire_type = wire_type
        self._wire = WIRE_DTYPES.get(wire_type)
        self._layouts = ReplyLayouts(self._wire)
        self.hosted = message.mode == optimizer_pb2.MODE_HOSTED
        self.name = message.name.removeprefix(PREFIX)
        self._connection = connection
        self._resource = message.name
        self._slots = list(message.slots)
        self._known = KnownSettings.of(message)
        self._model = self._table(message.parameters)

    def _table(self, parameters: Sequence[optimizer_pb2.Parameter]) -> ParameterTable:
        """The table of parameters of this optimizer."""
        method = algorithms.ALGORITHMS.get(self._known.method)
        return ParameterTable(self.name, parameters, takes_curvature=method is not None and method.takes_curvature)

    def update(
        self,
        algorithm: algorithms.Algorithm | None = None,
        *,
        schedule: settings.Schedule | EllipsisType | None = ...,
        clipping: settings.Clipping | EllipsisType | None = ...,
        groups: Sequence[settings.Group] | EllipsisType = ...,
        weight_decay: float | settings.WeightDecay | None = None,
        consistency: settings.Consistency | EllipsisType | None = ...,
        **hyperparameters: float,
    ) -> None:
        """Change settings from the next step on. The state, and settings that are not given, stay as they are.

        Args:
            algorithm: The same method with all hyper-parameters; those that are left out get their defaults.
            schedule: The new schedule, or None for a constant learning rate.
            clipping: The new clipping, or None for no clipping.
            groups: All new groups; they replace the old ones.
            weight_decay: The new weight decay, of any kind; only in hosted mode.
            consistency: The new consistency, or None for one client at a time.
            hyperparameters: Single hyper-parameters of the method, by name; the others stay as they are.

        Raises:
            InvalidArgumentError: Another method, an unknown hyper-parameter, or a value out of range.
            FailedPreconditionError: The consistency cannot change while workers are alive.

        Example:
            >>> opt.update(learning_rate=0.5)                             # doctest: +SKIP
            >>> opt.update(optserve.Adadelta(rho=0.9), schedule=None)     # doctest: +SKIP
        """
        changes = Changes(schedule, clipping, groups, weight_decay, consistency)
        # Weight decays of groups are of the optimizer's kind, which another client may have changed.
        kind = None if groups is ... else self._get().weight_decay_kind
        request = update_request(self._resource, self._known.method, algorithm, changes, hyperparameters, kind)
        updated = self._connection.call(self._connection.stub.UpdateOptimizer, request).optimizer
        self._known = KnownSettings.of(replies.optimizer(updated, self._resource))

    @property
    def algorithm(self) -> algorithms.Algorithm:
        """The method with its present hyper-parameters, as the server has them."""
        return replies.method(self._get())

    @property
    def schedule(self) -> settings.Schedule | None:
        """The present schedule of the learning rate, as the server has it."""
        return schedule_from(self._get())

    @property
    def clipping(self) -> settings.Clipping | None:
        """The present clipping of gradients, as the server has it."""
        return clipping_from(self._get())

    @property
    def groups(self) -> tuple[settings.Group, ...]:
        """The present groups of parameters, as the server has them."""
        return groups_from(self._get())

    @property
    def weight_decay(self) -> float | settings.WeightDecay:
        """The present weight decay of the parameters, as the server has it; 0 in delta mode."""
        return weight_decay_from(self._get())

    @property
    def consistency(self) -> settings.Consistency | None:
        """The present consistency, as the server has it; None for one client at a time."""
        return consistency_from(self._get())

    def _check_same(self, wanted: optimizer_pb2.Optimizer) -> None:
        """Raise InvalidArgumentError unless the optimizer has the parameters, the mode and the settings of `wanted`."""
        check_is_same(self._get(), wanted)

    def _push_parameters_if_missing(self, params: Mapping[str, np.ndarray]) -> None:
        """Upload the parameters x unless another client has uploaded them; see `push_parameters`."""
        try:
            # No step is newer than MAX_STEP, so this transfers nothing. It only fails if there are no parameters.
            self.pull_parameters(newer_than=MAX_STEP)
        except FailedPreconditionError as error:
            if error.reason != _reasons.PARAMETERS_MISSING:
                raise
        else:
            return
        try:
            self.push_parameters(params)
        except FailedPreconditionError as error:
            if error.reason != _reasons.PARAMETERS_IN_PLACE:
                raise

    def push_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        """Upload all parameters x to an optimizer in hosted mode. This is possible once.

        Raises:
            FailedPreconditionError: The parameters are already uploaded (PARAMETERS_IN_PLACE), so pull them; or the
                optimizer is in delta mode (NOT_HOSTED).
            InvalidArgumentError: A name, shape, dtype or value is wrong. Nothing was changed.
        """
        indices = self._model.selected_indices(params, partial=False, what="parameter")
        arrays = [self._model.contiguous(index, params[self._model.names[index]], "parameter") for index in indices]
        push_parameters(self._connection, self._resource, arrays)

    @overload
    def pull_parameters(
        self, names: Sequence[str] = (), *, newer_than: None = None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters: ...

    @overload
    def pull_parameters(
        self, names: Sequence[str] = (), *, newer_than: int | None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters | None: ...

    def pull_parameters(
        self,
        names: Sequence[str] = (),
        *,
        newer_than: int | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> HostedParameters | None:
        """Read the parameters x that the server holds, all of one step. Other clients may make steps meanwhile.

        Args:
            names: The parameters to read; all by default.
            newer_than: Read them only if more steps than this have been applied.
            out: Arrays for the values; new arrays are made by default. If the call raises, the arrays are as they were;
                of more than 1 MiB, the first elements, in the order of the parameters, may be newer.

        Returns:
            The step and the arrays; None if no newer step was applied.

        Raises:
            FailedPreconditionError: The parameters are not uploaded yet (PARAMETERS_MISSING), or the optimizer is in
                delta mode (NOT_HOSTED).
        """
        return self._pull_parameters(names, newer_than, out)

    def _pull_parameters(
        self,
        names: Sequence[str],
        newer_than: int | None,
        out: Mapping[str, np.ndarray] | None,
        timeout_s: float | None = None,
    ) -> HostedParameters | None:
        indices = self._model.indices_of(names or self._model.names)
        arrays = self._model.outputs(indices, out)
        request = replicas_pb2.PullParametersRequest(
            name=self._resource, newer_than_step=newer_than, tensors=indices, wire_type=self._wire_type
        )
        step, newer = pull_parameters(self._connection, request, Updates(indices, arrays, self._layouts), timeout_s)
        if not newer:
            return None
        return HostedParameters(step, {self._model.names[i]: a for i, a in zip(indices, arrays, strict=True)})

    def statistics(
        self,
        names: Sequence[str] = (),
        *,
        quantiles: Sequence[float] = QUANTILES,
        indices: Sequence[int] = (),
        random_indices: int = 0,
        seed: int = 0,
    ) -> Statistics:
        """Compute statistics of the state between two steps. Steps can go on meanwhile.

        Args:
            names: The parameters; all by default.
            quantiles: Quantiles of the effective learning rate, each in [0, 1].
            indices: Flat indices of single elements, for each parameter.
            random_indices: Number of elements to draw of each parameter, instead of `indices`.
            seed: Seed of the draw.

        Raises:
            InvalidArgumentError: There is no such parameter, element or quantile.
        """
        # All are listed too, because others may have been added by another client.
        tensors = self._model.indices_of(names or self._model.names)
        request = statistics_pb2.GetStatisticsRequest(
            name=self._resource,
            tensors=tensors,
            quantiles=quantiles,
            indices=indices,
            random_indices=random_indices,
            seed=seed,
        )
        response = self._connection.call(self._connection.stub.GetStatistics, request)
        asked = StatisticsRequest(
            tensors,
            list(quantiles) or QUANTILES,
            list(indices) or None,
            random_indices,
        )
        return statistics_from(response, self._model.names, self._slots, asked)

    def save_checkpoint(self, tag: str, *, overwrite: bool = False) -> Checkpoint:
        """Take a checkpoint: a named copy of the state and the hyper-parameters. It is as durable as the server.

        A checkpoint stays until it is deleted, also if its optimizer is deleted.

        Args:
            tag: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit.
            overwrite: Replace a checkpoint with this tag.

        Raises:
            AlreadyExistsError: The tag is taken, unless `overwrite`.
            UnavailableError: The server's disk has refused the checkpoint, or no server answers.
        """
        request = checkpoints_pb2.SaveCheckpointRequest(
            parent=self._resource, tag=tag, overwrite=overwrite, request_id=str(uuid.uuid4())
        )
        saved = self._call_with_step_timeout(self._connection.stub.SaveCheckpoint, request).checkpoint
        return checkpoint_from(saved, self._resource, tag)

    def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints of the optimizer, oldest first."""
        return list_checkpoints(self._connection, self._resource)

    def restore_checkpoint(self, tag: str) -> None:
        """Replace state, hyper-parameters and step counter by a checkpoint. Other clients get StateReplacedError.

        Raises:
            NotFoundError: There is no such tag.
            FailedPreconditionError: The checkpoint is of another method or of other parameters.
            CheckpointDamagedError: The file of the checkpoint is damaged. In all cases nothing was changed.
        """
        request = checkpoints_pb2.RestoreCheckpointRequest(
            name=f"{self._resource}/checkpoints/{tag}", request_id=str(uuid.uuid4())
        )
        restored = self._call_with_step_timeout(self._connection.stub.RestoreCheckpoint, request).optimizer
        self._on_state_replaced(replies.optimizer(restored, self._resource))

    def delete_checkpoint(self, tag: str) -> None:
        """Delete a checkpoint.

        Raises:
            NotFoundError: There is no such tag.
        """
        delete_checkpoint(self._connection, self._resource, tag)

    def export_state(self, *, on_progress: Progress = no_progress) -> OptimizerState:
        """Read the whole state with its settings, all of one step. Other clients may make steps meanwhile."""
        return export_state(self._connection, self._resource, on_progress)

    def import_state(self, state: OptimizerState, *, on_progress: Progress = no_progress) -> None:
        """Replace state, step counter and settings by those of `state`. Other clients get StateReplacedError.

        Settings that the state leaves out stay as they are; see `OptimizerState.without`. The consistency stays too if
        the state has none.

        Raises:
            InvalidArgumentError: The state is of another method or other parameters, or has a NaN, an infinity, or a
                negative mean of squares, or a setting out of range. Nothing was changed.
            FailedPreconditionError: The state has another consistency, and workers are alive. Nothing was changed.
            FeatureUnavailableError: The state has other settings, and the server is too old to import settings.
        """
        imported = import_state(self._connection, self._get(), state, on_progress)
        self._on_state_replaced(imported)

    def _call_with_step_timeout(self, method: Callable[..., _Response], request: object) -> _Response:
        """Make a call with the time-out of a step, because it takes longer for a larger state."""
        return self._connection.call(method, request, timeout_s=self._connection.config.step_timeout_s)

    def _get(self, timeout_s: float | None = None) -> optimizer_pb2.Optimizer:
        request = service_pb2.GetOptimizerRequest(name=self._resource)
        found = self._connection.call(self._connection.stub.GetOptimizer, request, timeout_s=timeout_s).optimizer
        return replies.optimizer(found, self._resource)

    @abc.abstractmethod
    def _on_state_replaced(self, optimizer: optimizer_pb2.Optimizer) -> None:
        """This client has replaced the state: use the new state from now on."""
