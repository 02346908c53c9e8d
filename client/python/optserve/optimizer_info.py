"""Describes one optimizer of a list. It is a value and does not change with the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optserve._values.settings_messages import clipping_from, consistency_from, groups_from, method_from, schedule_from
from optserve.algorithms import Algorithm
from optserve.errors import InvalidArgumentError
from optserve.settings import Clipping, Consistency, Group, Schedule
from optserve.v1 import optimizer_pb2

PREFIX = "optimizers/"


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer at the moment of the list. Other fields of the contract's `Optimizer` can be read as well.

    Attributes:
        name: The name that `create_optimizer` got. Every call that takes a name accepts it.
        hosted: Whether the server holds the parameters as well.
        step: Steps applied.
        memory_bytes: Bytes that the optimizer occupies on the server.
        message: The message of the contract, without the parameters.
    """

    name: str
    hosted: bool
    step: int
    memory_bytes: int
    message: optimizer_pb2.Optimizer = field(repr=False)

    @property
    def algorithm(self) -> Algorithm:
        """The method with its hyper-parameters."""
        return method_from(self.message)

    @property
    def schedule(self) -> Schedule | None:
        """The schedule of the learning rate; None for a constant rate."""
        return schedule_from(self.message)

    @property
    def clipping(self) -> Clipping | None:
        """The clipping of the gradient; None for no clipping."""
        return clipping_from(self.message)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of parameters whose hyper-parameters differ."""
        return groups_from(self.message)

    @property
    def consistency(self) -> Consistency | None:
        """The consistency of its workers; None for one client at a time."""
        return consistency_from(self.message)

    def __getattr__(self, name: str) -> Any:
        """A field of the contract without an attribute here: `backend`, `create_time`, `mode` and others."""
        # `copy` reads attributes before there is a message.
        if name.startswith("_") or name == "message" or name not in self.message.DESCRIPTOR.fields_by_name:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")
        return getattr(self.message, name)


def info_from(message: optimizer_pb2.Optimizer) -> OptimizerInfo:
    """The description that a message holds."""
    return OptimizerInfo(
        message.name.removeprefix(PREFIX),
        message.mode == optimizer_pb2.MODE_HOSTED,
        message.step,
        message.memory_bytes,
        message,
    )


def resource_name(name: Any) -> str:
    """`optimizers/{name}`, also for a name that has this form already.

    Raises:
        InvalidArgumentError: The name is not a string.
    """
    if not isinstance(name, str):
        raise InvalidArgumentError(f"The name of an optimizer must be a string, not of type {type(name).__name__}.")
    return PREFIX + name.removeprefix(PREFIX)
