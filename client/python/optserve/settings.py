"""The settings of an optimizer beside its method: schedules, clipping, consistency, and groups of parameters.

The server applies them and checks their ranges; its `InvalidArgumentError` names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from optserve.errors import InvalidArgumentError
from optserve.v1 import algorithms_pb2, optimizer_pb2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor on the learning rate over the steps. The server computes it. Use a subclass.

    Args:
        warmup_steps: Steps in which the factor rises linearly to 1 before the schedule starts.
    """

    kind: ClassVar[str]

    warmup_steps: int = 0

    def _values(self) -> dict[str, Any]:
        """The values by name. Not by `dataclasses.asdict`, which would copy every milestone and take seconds."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def to_message(self) -> algorithms_pb2.Schedule:
        """The message of the contract."""
        values = self._values()
        message = algorithms_pb2.Schedule(warmup_steps=values.pop("warmup_steps"))
        chosen = getattr(message, self.kind)
        chosen.SetInParent()
        chosen.MergeFrom(type(chosen)(**values))
        return message


@dataclass(frozen=True)
class Constant(Schedule):
    """The factor is always 1."""

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
        period_steps: Steps in which the factor is multiplied by `rate`.
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
        value: Every element is clipped to [−value, value].
        norm: Every tensor is scaled to a Euclidean norm of at most this.
        global_norm: All tensors of a step are scaled to a joint Euclidean norm of at most this.
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
        """The message of the contract."""
        return optimizer_pb2.Clipping(**self._given())


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """When the steps of several workers on one optimizer are applied, and of which gradients. Use a subclass.

    Args:
        lease_s: Seconds for which a worker counts as alive after its last report, 1 s to an hour.
        scale_by_staleness: Divide the learning rate by 1 + the staleness of the gradient (Zhang et al.,
            arXiv:1511.05950), so that many workers together change x as much as one worker would.
    """

    kind: ClassVar[str]

    lease_s: float = 30.0
    scale_by_staleness: bool = False

    def to_message(self) -> optimizer_pb2.Consistency:
        """The message of the contract."""
        values = asdict(self)
        message = optimizer_pb2.Consistency(scale_by_staleness=values.pop("scale_by_staleness"))
        message.lease.FromNanoseconds(int(values.pop("lease_s") * 1e9))
        chosen = getattr(message, self.kind)
        chosen.SetInParent()
        chosen.MergeFrom(type(chosen)(**values))
        return message


@dataclass(frozen=True)
class Async(Consistency):
    """The server applies gradients in the order in which they arrive."""

    kind = "async"


@dataclass(frozen=True)
class Bounded(Consistency):
    """Like `Async`, but a worker that is too far ahead of the slowest live worker waits.

    Args:
        staleness: Most steps that a worker may be ahead. With 0, all workers make the same number of steps.
    """

    kind = "bounded"

    staleness: int


@dataclass(frozen=True)
class Sync(Consistency):
    """A step is the mean of several workers' gradients, all taken at the same parameters.

    Args:
        workers: Number of gradients that make a step.
        backup_workers: Number of additional workers. A step does not wait for the slowest so many workers.
    """

    kind = "sync"

    workers: int
    backup_workers: int = 0


CONSISTENCIES: dict[str, type[Consistency]] = {kind.kind: kind for kind in (Async, Bounded, Sync)}
"""Every kind by its name in the contract."""


@dataclass(frozen=True)
class WeightDecay:
    """The weight decay of the parameters x that the server holds, where it is not a plain number. Use a subclass.

    A plain number λ is a decay by the same part in each step: x ← x + (Δx − λ x).

    Args:
        factor: λ, not negative, of the parameters whose group has none of its own. That of a group is of the same kind.
    """

    kind: ClassVar[str]

    factor: float


@dataclass(frozen=True)
class TimesLearningRate(WeightDecay):
    """x ← x + (Δx − η λ x), with the learning rate η of the step: the decay of torch.optim.AdamW and optax.adamw.

    It follows the schedule. η λ must be less than 1.

    Example:
        >>> TimesLearningRate(0.01)
        TimesLearningRate(factor=0.01)
    """

    kind = "times_learning_rate"


@dataclass(frozen=True)
class L2(WeightDecay):
    """The method gets g + λ x: the `weight_decay` of torch.optim's optimizers other than AdamW.

    The server adds λ x after it has clipped g, as torch does after `clip_grad_norm_`.

    Example:
        >>> L2(1e-4)
        L2(factor=0.0001)
    """

    kind = "l2"


WEIGHT_DECAYS: dict[str, type[WeightDecay]] = {kind.kind: kind for kind in (TimesLearningRate, L2)}
"""Every kind of weight decay that is not a plain number, by its name on disk."""


@dataclass(frozen=True)
class Group:
    """Parameters whose hyper-parameters differ from the optimizer's.

    Args:
        parameters: Their names; no parameter is in two groups.
        overrides: Hyper-parameters of the optimizer's method by name; the others are those of the optimizer.
        weight_decay: Weight decay of the group, in hosted mode; that of the optimizer by default. It is a number; its
            kind is that of the optimizer's.

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

    def to_message(self, method: str, *, fixed: bool = True) -> optimizer_pb2.ParameterGroup:
        """The message of the contract.

        Args:
            method: Name of the method there.
            fixed: Whether the weight decay of the optimizer is of the fixed kind, a plain number.

        Raises:
            InvalidArgumentError: The method has no such hyper-parameter.
        """
        message = optimizer_pb2.ParameterGroup(parameters=self.parameters)
        if self.weight_decay is not None:
            setattr(message, "weight_decay" if fixed else "weight_decay_factor", self.weight_decay)
        getattr(message.algorithm, method).SetInParent()
        for name, value in self.overrides.items():
            set_hyperparameter(message.algorithm, method, name, value)
        return message


def set_hyperparameter(message: algorithms_pb2.Algorithm, method: str, name: str, value: object) -> None:
    """Set one hyper-parameter of a method in a message, by its name in the contract.

    Raises:
        InvalidArgumentError: The method has no such hyper-parameter, or the value has the wrong type.
    """
    settings = getattr(message, method)
    known = settings.DESCRIPTOR.fields_by_name
    if name not in known:
        raise InvalidArgumentError(f"{method} has no {name!r}; it has {', '.join(known)}.")
    try:
        if known[name].type == known[name].TYPE_BOOL and not isinstance(value, bool):
            raise TypeError("it is True or False")
        setattr(settings, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{name} of {method} cannot be {value!r}: {error}") from error
