"""The optimizer that an adapter needs at the server: created, continued, or begun anew if its name is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from optserve.algorithms import Algorithm
from optserve.client import Client
from optserve.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from optserve.optimizer import Optimizer
from optserve.settings import Clipping, Group
from optserve.state import OptimizerState, TensorSpec

IfExists = Literal["error", "resume", "replace"]
"""What happens if the server has an optimizer of that name: an AlreadyExistsError; or it goes on with its state, under
the settings given; or it is deleted, and a new one begins."""


@dataclass(frozen=True)
class Wanted:
    """The optimizer that an adapter needs.

    Attributes:
        algorithm: The method.
        specs: The parameters by name, in their order.
        groups: Groups of parameters whose hyper-parameters differ.
        clipping: Clipping by the server; None for none, or for that which an optimizer that exists has.
        initial_state: Makes the state with which it begins; None if that is 0 everywhere.
        values: Makes the values of the parameters, if the server is to hold them.
    """

    algorithm: Algorithm
    specs: Mapping[str, TensorSpec]
    groups: Sequence[Group] = ()
    clipping: Clipping | None = None
    initial_state: Callable[[], OptimizerState] | None = None
    values: Callable[[], Mapping[str, np.ndarray]] | None = None


def check_if_exists(choice: object) -> None:
    """Raise InvalidArgumentError for something that is not IfExists."""
    if choice not in get_args(IfExists):
        raise InvalidArgumentError(f"if_exists is 'error', 'resume' or 'replace', not {choice!r}.")


def create_or_adopt(client: Client, name: str, if_exists: IfExists, wanted: Wanted) -> bool:
    """Create an optimizer, or make that of the same name what is wanted. Returns whether there was one before.

    Raises:
        AlreadyExistsError: There is one of that name, and `if_exists` is `error`.
        InvalidArgumentError: The one that exists has another method, or other parameters.
        OptserveError: As for `Client.create_optimizer`.
    """
    if if_exists == "replace":
        client.delete_optimizer(name, missing_ok=True)
    if if_exists == "resume":
        try:
            existing = client.optimizer(name)
        except NotFoundError:
            pass
        else:
            adopt(existing, wanted)
            return True
    _create(client, name, wanted)
    return False


def _create(client: Client, name: str, wanted: Wanted) -> None:
    try:
        if wanted.initial_state is None:
            params = wanted.specs if wanted.values is None else wanted.values()
            hosted = wanted.values is not None
            client.create_optimizer(
                name, wanted.algorithm, params, groups=wanted.groups, clipping=wanted.clipping, hosted=hosted
            )
            return
        created = client.create_optimizer_from_state(name, wanted.initial_state())
        if wanted.clipping is not None:
            created.update(clipping=wanted.clipping)
    except AlreadyExistsError as error:
        raise AlreadyExistsError(
            f"The server has an optimizer {name!r}: if_exists='resume' goes on with its state, if_exists='replace' "
            "deletes it and begins anew.",
            reason=error.reason,
            metadata=error.metadata,
        ) from error


def adopt(existing: Optimizer, wanted: Wanted) -> None:
    """Check that an optimizer is what is needed, and give it the settings.

    Raises:
        InvalidArgumentError: It has another method, or other parameters; nothing was changed.
    """
    if existing.hosted != (wanted.values is not None):
        raise InvalidArgumentError(
            f"The server {'holds' if existing.hosted else 'does not hold'} the parameters of {existing.name!r}; "
            f"that needs master_weights={existing.hosted} in PyTorch, and another name elsewhere."
        )
    present = [(item.name, tuple(item.shape), item.dtype.name) for item in existing._model.parameters]
    needed = [(name, spec.shape, spec.dtype) for name, spec in wanted.specs.items()]
    if present != needed:
        differing = [name for name, *_ in set(present) ^ set(needed)]
        what = (
            f"parameters of other names, shapes or dtypes, such as {min(differing)!r}" if differing else "another order"
        )
        raise InvalidArgumentError(f"The optimizer {existing.name!r} has {what}.")
    existing.update(
        wanted.algorithm, groups=wanted.groups, clipping=... if wanted.clipping is None else wanted.clipping
    )
