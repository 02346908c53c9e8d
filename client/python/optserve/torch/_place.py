"""The optimizer at the server that makes the steps of a RemoteOptimizer: found, created, deleted."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from optserve._resources.choices import TransportName, WireDtype
from optserve.algorithms import Algorithm
from optserve.client import Client, connect
from optserve.errors import (
    AlreadyExistsError,
    ClientUseError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    StepInProgressError,
    UnavailableError,
)
from optserve.optimizer import Optimizer
from optserve.settings import Clipping, Group
from optserve.state import OptimizerState, TensorSpec

IfExists = Literal["error", "resume", "replace"]

CLOSE_TIMEOUT_S = 2.0
"""How long `Place.close` waits for a server that is to delete an optimizer."""


@dataclass(frozen=True)
class Choices:
    """What the user chooses beside the method; see `RemoteOptimizer`."""

    name: str | None
    if_exists: IfExists
    clipping: Clipping | None
    transport: TransportName
    wire_dtype: WireDtype


@dataclass(frozen=True)
class Wanted:
    """The optimizer that a RemoteOptimizer needs.

    Attributes:
        algorithm: The method.
        groups: All param groups but the first.
        specs: The parameters by name, in the order of the groups.
        initial_state: Makes the state with which it begins; None if that is 0 everywhere.
        values: Makes the values of the parameters, if the server is to hold them.
    """

    algorithm: Algorithm
    groups: list[Group]
    specs: Mapping[str, TensorSpec]
    initial_state: Callable[[], OptimizerState] | None
    values: Callable[[], Mapping[str, np.ndarray]] | None


class Place:
    """The optimizer at the server, and who closes what.

    Args:
        server: An address, a client or an optimizer.
        choices: See Choices; only `clipping` counts for an optimizer that exists.
        wanted: What it has to be.

    Attributes:
        existed: Whether the server had it before.

    Raises:
        OptserveError: See `RemoteOptimizer`.
    """

    def __init__(self, server: str | Client | Optimizer, choices: Choices, wanted: Wanted) -> None:
        self._closed = False
        self.existed = isinstance(server, Optimizer)
        self._own_client: Client | None = None
        self._deletes: Client | None = None
        if isinstance(server, Optimizer):
            _adopt(server, choices.clipping, wanted)
            self._remote = server
            return
        if isinstance(server, str):
            server = self._own_client = connect(server)
        try:
            self._remote, self.existed = _created(server, choices, wanted)
        except BaseException:
            if self._own_client is not None:
                self._own_client.close()
            raise
        self._deletes = server if choices.name is None else None

    @property
    def remote(self) -> Optimizer:
        """The optimizer, or raise ClientUseError after `close`."""
        if self._closed:
            raise ClientUseError("This RemoteOptimizer is closed.")
        return self._remote

    def __repr__(self) -> str:
        return "closed" if self._closed else repr(self._remote)

    def close(self) -> None:
        """Close the stream, and the connection that `server` has opened; delete an optimizer that got no name.

        If no server answers in time, there is a warning with the name of the optimizer that stays there.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._remote.close()
            if self._deletes is not None:
                self._delete(self._deletes)
        finally:
            if self._own_client is not None:
                self._own_client.close()

    def _delete(self, client: Client) -> None:
        name = self._remote.name
        try:
            client.delete_optimizer(name, missing_ok=True, timeout_s=CLOSE_TIMEOUT_S)
        except (UnavailableError, DeadlineExceededError, StepInProgressError) as error:
            # An end of a with-block would otherwise replace the error that has ended it.
            warnings.warn(
                f"{name!r} may stay at the server, because it could not be deleted: {error} "
                f"`optserve optimizers delete {name}` deletes it.",
                RuntimeWarning,
                stacklevel=4,
            )


def existing_method(server: object, algorithm: object, name: str | None) -> Algorithm:
    """The method: the one that was given, or that of an optimizer that exists; raises InvalidArgumentError."""
    if isinstance(server, Optimizer):
        if name is not None:
            raise InvalidArgumentError("An optimizer that exists has a name; leave out `name`.")
        if algorithm is None and server.groups:
            raise InvalidArgumentError(f"{server.name!r} has groups; pass its algorithm, and param groups.")
        algorithm = algorithm or server.algorithm
    elif not isinstance(server, (str, Client)):
        raise InvalidArgumentError(
            f"server must be an address such as '127.0.0.1:50051', a client or an optimizer, not {server!r}."
        )
    if not isinstance(algorithm, Algorithm):
        raise InvalidArgumentError(f"algorithm must be something like optserve.AdamW(1e-3), not {algorithm!r}.")
    return algorithm


def _created(client: Client, choices: Choices, wanted: Wanted) -> tuple[Optimizer, bool]:
    """(the optimizer of the chosen name, whether it existed before)."""
    if choices.if_exists not in ("error", "resume", "replace"):
        raise InvalidArgumentError(f"if_exists is error, resume or replace, not {choices.if_exists!r}.")
    name = choices.name or f"torch-{uuid.uuid4().hex[:12]}"
    if choices.if_exists == "replace":
        client.delete_optimizer(name, missing_ok=True)
    existed = False
    if choices.if_exists == "resume":
        with suppress(NotFoundError):
            _adopt(client.optimizer(name), choices.clipping, wanted)
            existed = True
    if not existed:
        _create(client, name, choices.clipping, wanted)
    return client.optimizer(name, transport=choices.transport, wire_dtype=choices.wire_dtype), existed


def _create(client: Client, name: str, clipping: Clipping | None, wanted: Wanted) -> None:
    try:
        if wanted.initial_state is None:
            params = wanted.specs if wanted.values is None else wanted.values()
            hosted = wanted.values is not None
            client.create_optimizer(
                name, wanted.algorithm, params, groups=wanted.groups, clipping=clipping, hosted=hosted
            )
            return
        created = client.create_optimizer_from_state(name, wanted.initial_state())
        if clipping is not None:
            created.update(clipping=clipping)
    except AlreadyExistsError as error:
        raise AlreadyExistsError(
            f"The server has an optimizer {name!r}: if_exists='resume' goes on with its state, if_exists='replace' "
            "deletes it and begins anew.",
            reason=error.reason,
            metadata=error.metadata,
        ) from error


def _adopt(existing: Optimizer, clipping: Clipping | None, wanted: Wanted) -> None:
    """Check that an optimizer is what is needed, and give it the settings."""
    if existing.hosted != (wanted.values is not None):
        raise InvalidArgumentError(
            f"The server {'holds' if existing.hosted else 'does not hold'} the parameters of {existing.name!r}; "
            f"that needs master_weights={existing.hosted}."
        )
    present = [(item.name, tuple(item.shape), item.dtype.name) for item in existing._model.parameters]
    needed = [(name, spec.shape, spec.dtype) for name, spec in wanted.specs.items()]
    if present != needed:
        differing = [name for name, *_ in set(present) ^ set(needed)]
        what = (
            f"parameters of other names, shapes or dtypes, such as {min(differing)!r}" if differing else "another order"
        )
        raise InvalidArgumentError(f"The optimizer {existing.name!r} has {what}.")
    existing.update(wanted.algorithm, groups=wanted.groups, clipping=... if clipping is None else clipping)
