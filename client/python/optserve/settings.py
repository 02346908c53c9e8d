"""What goes with the method of an optimizer: annealing, clipping, and groups of parameters that differ.

What they compute is on the server, which checks ranges; its `InvalidArgumentError` names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from optserve.errors import InvalidArgumentError
from optserve.v1 import algorithms_pb2, optimizer_pb2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor on the learning rate over the steps, evaluated by the server. Use a subclass.

    Args:
        warmup_steps: Steps in which the factor rises linearly to 1 before the schedule starts.
    """

    kind: ClassVar[str]

    warmup_steps: int = 0

    def _values(self) -> dict[str, Any]:
        """By name, as they are; `dataclasses.asdict` would copy every milestone by itself, which takes seconds."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def to_message(self) -> algorithms_pb2.Schedule:
        """The contract's form."""
        values = self._values()
        message = algorithms_pb2.Schedule(warmup_steps=values.pop("warmup_steps"))
        chosen = getattr(message, self.kind)
        chosen.SetInParent()
        chosen.MergeFrom(type(chosen)(**values))
        return message


@dataclass(frozen=True)
class Constant(Schedule):
    """Always 1."""

    kind = "constant"


@dataclass(frozen=True)
class InverseTime(Schedule):
    """1 / (1 + decay t): 1 / t annealing, Robbins and Monro.

    Args:
        decay: Per step, positive.
    """

    kind = "inverse_time"

    decay: float


@dataclass(frozen=True)
class Exponential(Schedule):
    """rate ^ (t / period_steps).

    Args:
        rate: In (0, 1].
        period_steps: Steps in which the factor falls by `rate`.
    """

    kind = "exponential"

    rate: float
    period_steps: int = 1


@dataclass(frozen=True)
class AtSteps(Schedule):
    """rate ^ (number of milestones that are at most t).

    Args:
        rate: In (0, 1].
        milestones: Steps, strictly increasing.
    """

    kind = "step"

    rate: float
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        """Take any sequence."""
        object.__setattr__(self, "milestones", tuple(self.milestones))


@dataclass(frozen=True)
class Cosine(Schedule):
    """floor + (1 − floor) (1 + cos(π t / period_steps)) / 2, and floor from period_steps on.

    Args:
        period_steps: Steps until the factor is `floor`.
        floor: In [0, 1].
    """

    kind = "cosine"

    period_steps: int
    floor: float = 0.0


SCHEDULES: dict[str, type[Schedule]] = {
    kind.kind: kind for kind in (Constant, InverseTime, Exponential, AtSteps, Cosine)
}
"""Every schedule by its name in the contract."""


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """A bound on the gradient, applied by the server before the method. Give one of the three.

    Args:
        value: Every element into [−value, value].
        norm: Every tensor's Euclidean norm to at most this.
        global_norm: The Euclidean norm over all tensors of a step to at most this.
    """

    value: float | None = None
    norm: float | None = None
    global_norm: float | None = None

    def __post_init__(self) -> None:
        """Raise InvalidArgumentError unless one of the three is given."""
        if len(self._given()) != 1:
            raise InvalidArgumentError("Clipping takes one of value, norm and global_norm.")

    def _given(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_message(self) -> optimizer_pb2.Clipping:
        """The contract's form."""
        return optimizer_pb2.Clipping(**self._given())


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How the gradients of several workers on one optimizer come together. Use a subclass.

    Args:
        lease_s: How long a worker lives after its last report, 1 s to an hour.
        scale_by_staleness: Divide the learning rate by 1 + the steps applied since the parameters that a gradient was
            taken at (Zhang et al., arXiv:1511.05950), so that many workers move as far together as one would.
    """

    kind: ClassVar[str]

    lease_s: float = 30.0
    scale_by_staleness: bool = False

    def to_message(self) -> optimizer_pb2.Consistency:
        """The contract's form."""
        values = asdict(self)
        message = optimizer_pb2.Consistency(scale_by_staleness=values.pop("scale_by_staleness"))
        message.lease.FromNanoseconds(int(values.pop("lease_s") * 1e9))
        chosen = getattr(message, self.kind)
        chosen.SetInParent()
        chosen.MergeFrom(type(chosen)(**values))
        return message


@dataclass(frozen=True)
class Async(Consistency):
    """Gradients are applied in the order in which they arrive."""

    kind = "async"


@dataclass(frozen=True)
class Bounded(Consistency):
    """Likewise, but a worker that is ahead of the slowest live one waits.

    Args:
        staleness: Steps that a worker may have made more than the slowest; 0 is lock-step.
    """

    kind = "bounded"

    staleness: int


@dataclass(frozen=True)
class Sync(Consistency):
    """A step is the mean of several workers' gradients, all taken at the same parameters.

    Args:
        workers: How many gradients make a step.
        backup_workers: More workers than that, of which the slowest are not waited for.
    """

    kind = "sync"

    workers: int
    backup_workers: int = 0


CONSISTENCIES: dict[str, type[Consistency]] = {kind.kind: kind for kind in (Async, Bounded, Sync)}
"""Every kind by its name in the contract."""


@dataclass(frozen=True)
class Group:
    """Parameters whose hyper-parameters differ from the optimizer's.

    Args:
        parameters: Their names; no parameter is in two groups.
        overrides: Hyper-parameters of the optimizer's method by name; the others are the optimizer's.
        weight_decay: Where the server holds the parameters; the optimizer's by default.

    Example:
        >>> Group(("b1", "b2"), {"learning_rate": 0.1})
        Group(parameters=('b1', 'b2'), overrides={'learning_rate': 0.1}, weight_decay=None)
    """

    parameters: Sequence[str]
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        """Take any sequence of names, but not one name for a sequence of its letters."""
        if isinstance(self.parameters, str):
            raise InvalidArgumentError(f"A group has a sequence of names: pass [{self.parameters!r}].")
        object.__setattr__(self, "parameters", tuple(self.parameters))

    def to_message(self, method: str) -> optimizer_pb2.ParameterGroup:
        """The contract's form, for a method by its name there.

        Raises:
            InvalidArgumentError: The method has no such hyper-parameter.
        """
        message = optimizer_pb2.ParameterGroup(parameters=self.parameters, weight_decay=self.weight_decay)
        getattr(message.algorithm, method).SetInParent()
        for name, value in self.overrides.items():
            set_hyperparameter(message.algorithm, method, name, value)
        return message


def set_hyperparameter(message: algorithms_pb2.Algorithm, method: str, name: str, value: object) -> None:
    """Make a message say one hyper-parameter of a method, by its name there.

    Raises:
        InvalidArgumentError: The method has no such hyper-parameter, or it is not of that type.
    """
    settings = getattr(message, method)
    known = settings.DESCRIPTOR.fields_by_name
    if name not in known:
        raise InvalidArgumentError(f"{method} has no {name!r}; it has {', '.join(known)}.")
    try:
        setattr(settings, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{name} of {method} cannot be {value!r}: {error}") from error
