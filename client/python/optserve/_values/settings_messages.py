"""Turns settings of an optimizer into messages of the contract, and messages into settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import EllipsisType, MappingProxyType
from typing import Any

from optserve._values.arrays import check_kind
from optserve.algorithms import Algorithm, from_message
from optserve.errors import FeatureUnavailableError, InvalidArgumentError
from optserve.settings import (
    CONSISTENCIES,
    SCHEDULES,
    WEIGHT_DECAYS,
    Clipping,
    Consistency,
    Group,
    Schedule,
    WeightDecay,
    set_hyperparameter,
)
from optserve.v1 import optimizer_pb2, service_pb2

_FIXED = (optimizer_pb2.WEIGHT_DECAY_KIND_UNSPECIFIED, optimizer_pb2.WEIGHT_DECAY_KIND_FIXED)


def method_from(message: optimizer_pb2.Optimizer) -> Algorithm:
    """The method of an optimizer.

    Raises:
        FeatureUnavailableError: The server is newer, and this client does not know the method. The functions below
            raise this error for other settings.
    """
    try:
        return from_message(message.algorithm)
    except ValueError as error:
        raise FeatureUnavailableError(str(error)) from error


def _kind_of(message: optimizer_pb2.Optimizer, field: str, oneof: str) -> str | None:
    """Which kind of a setting an optimizer has; None if it has no such setting."""
    name = getattr(message, field).WhichOneof(oneof)
    if name is None and message.HasField(field):
        raise FeatureUnavailableError(f"This client does not know the {field} of {message.name!r}; a newer client may.")
    return name


def schedule_from(message: optimizer_pb2.Optimizer) -> Schedule | None:
    """The schedule of an optimizer; None for a constant learning rate."""
    name = _kind_of(message, "schedule", "kind")
    if name is None:
        return None
    kind, given = SCHEDULES[name], getattr(message.schedule, name)
    values: dict[str, Any] = {item.name: getattr(given, item.name) for item in given.DESCRIPTOR.fields}
    known = {item.name for item in fields(kind)}
    return kind(
        warmup_steps=message.schedule.warmup_steps, **{key: value for key, value in values.items() if key in known}
    )


def clipping_from(message: optimizer_pb2.Optimizer) -> Clipping | None:
    """The clipping of an optimizer; None for no clipping."""
    kind = _kind_of(message, "clipping", "bound")
    return Clipping(**{kind: getattr(message.clipping, kind)}) if kind else None


def consistency_from(message: optimizer_pb2.Optimizer) -> Consistency | None:
    """The consistency of an optimizer; None for one client at a time."""
    name = _kind_of(message, "consistency", "kind")
    if name is None:
        return None
    given = getattr(message.consistency, name)
    return CONSISTENCIES[name](
        lease_s=message.consistency.lease.ToNanoseconds() / 1e9,
        scale_by_staleness=message.consistency.scale_by_staleness,
        **{item.name: getattr(given, item.name) for item in given.DESCRIPTOR.fields},
    )


def groups_from(message: optimizer_pb2.Optimizer) -> tuple[Group, ...]:
    """The groups of an optimizer."""
    groups = []
    for group in message.groups:
        settings = getattr(group.algorithm, group.algorithm.WhichOneof("method") or "adadelta")
        overrides = {item.name: value for item, value in settings.ListFields()}
        field = "weight_decay" if is_fixed(message) else "weight_decay_factor"
        decay = getattr(group, field) if group.HasField(field) else None
        groups.append(Group(tuple(group.parameters), overrides, decay))
    return tuple(groups)


def group_messages(groups: Iterable[Group], method: str, *, fixed: bool) -> list[optimizer_pb2.ParameterGroup]:
    """The messages of all groups.

    Args:
        groups: The groups.
        method: Name of the optimizer's method.
        fixed: Whether the weight decay of the optimizer is of the fixed kind.
    """
    return [group.to_message(method, fixed=fixed) for group in groups]


def is_fixed(message: optimizer_pb2.Optimizer) -> bool:
    """Whether the weight decay of an optimizer is of the fixed kind, a plain number."""
    return message.weight_decay_kind in _FIXED


def weight_decay_from(message: optimizer_pb2.Optimizer) -> float | WeightDecay:
    """The weight decay of an optimizer; 0 for none."""
    if is_fixed(message):
        return message.weight_decay
    for kind in WEIGHT_DECAYS.values():
        if message.weight_decay_kind == _kind_number(kind.kind):
            return kind(message.weight_decay_factor)
    raise FeatureUnavailableError(
        f"This client does not know the weight decay of {message.name!r}; a newer client may."
    )


def set_weight_decay(message: optimizer_pb2.Optimizer, weight_decay: float | WeightDecay) -> None:
    """Make a message say a weight decay.

    Raises:
        InvalidArgumentError: It is neither a number nor a WeightDecay.
    """
    try:
        if isinstance(weight_decay, WeightDecay):
            message.weight_decay_factor = weight_decay.factor
            message.weight_decay_kind = _kind_number(weight_decay.kind)
        else:
            message.weight_decay = weight_decay
            message.weight_decay_kind = optimizer_pb2.WEIGHT_DECAY_KIND_FIXED
    except TypeError as error:
        raise InvalidArgumentError(f"weight_decay cannot be {weight_decay!r}: {error}") from error


def _kind_number(kind: str) -> Any:
    return optimizer_pb2.WeightDecayKind.Value(f"WEIGHT_DECAY_KIND_{kind.upper()}")


def check_kinds(algorithm: object, schedule: object, clipping: object, groups: Any, consistency: object) -> None:
    """Check that arguments are settings, None, or an Ellipsis.

    Raises:
        InvalidArgumentError: An argument is a class instead of an object of the class, or something else.
    """
    if algorithm is not None:
        check_kind(algorithm, Algorithm, "algorithm", "Adadelta()")
    for value, kind, what, example in (
        (schedule, Schedule, "schedule", "Cosine(period_steps=100)"),
        (clipping, Clipping, "clipping", "Clipping(global_norm=1.0)"),
        (consistency, Consistency, "consistency", "Async()"),
    ):
        if value is not None and value is not ...:
            check_kind(value, kind, what, example)
    if groups is not ...:
        if isinstance(groups, Group) or not isinstance(groups, Sequence):
            raise InvalidArgumentError("groups must be a sequence, such as [Group(['w'], {'learning_rate': 0.1})].")
        for group in groups:
            check_kind(group, Group, "A group", "Group(['w'], {'learning_rate': 0.1})")


def settings_from(message: optimizer_pb2.Optimizer) -> dict[str, Any]:
    """All settings of an optimizer by name, the method included."""
    return {
        "algorithm": method_from(message),
        "schedule": schedule_from(message),
        "clipping": clipping_from(message),
        "groups": groups_from(message),
        "weight_decay": weight_decay_from(message),
        "consistency": consistency_from(message),
    }


def differences(message: optimizer_pb2.Optimizer, **wanted: Any) -> list[str]:
    """Differences between an optimizer's settings and the wanted ones, each as a clause of a sentence.

    Args:
        message: The optimizer.
        wanted: Settings by name. A setting that is not given, or is an Ellipsis, is not compared.
    """
    present = settings_from(message)
    return [
        f"its {name} is {present[name]}, not {value}"
        for name, value in wanted.items()
        if value is not ... and value != present[name]
    ]


def check_is_same(present: optimizer_pb2.Optimizer, wanted: optimizer_pb2.Optimizer) -> None:
    """Raise InvalidArgumentError unless an optimizer has the parameters, the mode and the settings of `wanted`."""
    name = present.name.rpartition("/")[2]
    exists = f"An optimizer {name!r} exists already, and"
    if [(item.name, item.shape, item.data_type) for item in present.parameters] != [
        (item.name, item.shape, item.data_type) for item in wanted.parameters
    ]:
        raise InvalidArgumentError(f"{exists} it has other parameters.")
    if present.mode != wanted.mode:
        holds = "holds" if present.mode == optimizer_pb2.MODE_HOSTED else "does not hold"
        raise InvalidArgumentError(f"{exists} the server {holds} its parameters.")
    others = differences(present, **settings_from(wanted))
    if others:
        raise InvalidArgumentError(
            f"{exists} {others[0]}. To use it as it is, call client.optimizer({name!r}); its `update` changes settings."
        )


@dataclass(frozen=True)
class Changes:
    """Changes of settings. `...`, and a weight decay of None, leave a setting as it is. None removes a setting.

    See `optserve.Optimizer.update`.
    """

    schedule: Schedule | EllipsisType | None = ...
    clipping: Clipping | EllipsisType | None = ...
    groups: Sequence[Group] | EllipsisType = ...
    weight_decay: float | WeightDecay | None = None
    consistency: Consistency | EllipsisType | None = ...


def update_request(
    resource: str,
    method: str,
    algorithm: Algorithm | None,
    changes: Changes,
    hyperparameters: Mapping[str, Any] = MappingProxyType({}),
    decay_kind: optimizer_pb2.WeightDecayKind | None = None,
) -> service_pb2.UpdateOptimizerRequest:
    """The request that changes settings of an optimizer. Settings that are not given stay as they are.

    Args:
        resource: The resource name, `optimizers/…`.
        method: Name of the optimizer's method in the contract.
        algorithm: The method with all hyper-parameters; None to leave it as it is.
        changes: Changes of the other settings.
        hyperparameters: Single hyper-parameters of the method, by name.
        decay_kind: The present kind of the optimizer's weight decay, if groups are given.

    Raises:
        InvalidArgumentError: The method has no such hyper-parameter, or `algorithm` is given too.
    """
    check_kinds(algorithm, changes.schedule, changes.clipping, changes.groups, changes.consistency)
    request = service_pb2.UpdateOptimizerRequest(
        optimizer=optimizer_pb2.Optimizer(name=resource, weight_decay_kind=decay_kind)
    )
    message, paths = request.optimizer, request.update_mask.paths
    if algorithm is not None and hyperparameters:
        raise InvalidArgumentError(
            f"Give all hyper-parameters as {algorithm!r}, or {', '.join(hyperparameters)} alone, but not both."
        )
    if algorithm is not None:
        message.algorithm.CopyFrom(algorithm.to_message())
        paths.append("algorithm")
    for name, value in hyperparameters.items():
        set_hyperparameter(message.algorithm, method, name, value)
        paths.append(f"algorithm.{method}.{name}")
    for name in ("schedule", "clipping", "consistency"):
        value = getattr(changes, name)
        if not isinstance(value, EllipsisType):
            paths.append(name)
            if value is not None:
                getattr(message, name).CopyFrom(value.to_message())
    if changes.weight_decay is not None:
        set_weight_decay(message, changes.weight_decay)
        paths.append("weight_decay" if is_fixed(message) else "weight_decay_factor")
    if not isinstance(changes.groups, EllipsisType):
        paths.append("groups")
        message.groups.extend(group_messages(changes.groups, method, fixed=is_fixed(message)))
    # Servers from before there were kinds do not know this path, and refuse it. A fixed weight decay needs no kind.
    if not is_fixed(message) or (decay_kind or 0) not in _FIXED:
        paths.append("weight_decay_kind")
    return request
