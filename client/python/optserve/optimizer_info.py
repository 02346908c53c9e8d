"""What a server says of an optimizer in a list: a snapshot, not a handle."""

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
        name: As given to `create_optimizer`; every call that wants a name takes it.
        hosted: Whether the server holds the parameters as well.
        step: Steps applied.
        memory_bytes: What it occupies on the server.
        message: As the contract shows it, without the parameters.
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
        """The schedule of the learning rate; None for a constant one."""
        return schedule_from(self.message)

    @property
    def clipping(self) -> Clipping | None:
        """The bound on the gradient; None for none."""
        return clipping_from(self.message)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Parameters whose hyper-parameters differ."""
        return groups_from(self.message)

    @property
    def consistency(self) -> Consistency | None:
        """How workers share it; None for one client at a time."""
        return consistency_from(self.message)

    def __getattr__(self, name: str) -> Any:
        """A field of the contract that has no attribute of its own: `backend`, `create_time`, `mode` and others."""
        # copy asks for attributes before there is a message.
        if name.startswith("_") or name == "message" or name not in self.message.DESCRIPTOR.fields_by_name:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")
        return getattr(self.message, name)


def info_from(message: optimizer_pb2.Optimizer) -> OptimizerInfo:
    """The value that a message holds."""
    return OptimizerInfo(
        message.name.removeprefix(PREFIX),
        message.mode == optimizer_pb2.MODE_HOSTED,
        message.step,
        message.memory_bytes,
        message,
    )


def resource_name(name: Any) -> str:
    """`optimizers/{name}`, also of a name that has this form already.

    Raises:
        InvalidArgumentError: It is no string.
    """
    if not isinstance(name, str):
        raise InvalidArgumentError(f"The name of an optimizer is a string, not of type {type(name).__name__}.")
    return PREFIX + name.removeprefix(PREFIX)
