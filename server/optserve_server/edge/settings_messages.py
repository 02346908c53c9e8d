"""An optimizer's settings between protobuf and the domain, with the checks that belong to the message itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from optserve.v1 import algorithms_pb2, optimizer_pb2, steps_pb2
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge.decay_messages import (
    PATHS,
    decay_of,
    kind_of,
    own_decay_of,
    set_decay,
    set_own_decay,
    updated_decay,
)
from optserve_server.engine.optimizer import Optimizer
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.consistency import CONSISTENCIES, LEASE_S, Consistency
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.rules import RULES, Rule
from optserve_server.numerics.schedule import SCHEDULES, Schedule
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.step_settings import PLAIN, Change, StepOptions, StepSettings
from optserve_server.numerics.weight_decay import DecayKind


def settings(message: optimizer_pb2.Optimizer, layout: Layout) -> Settings:
    """The settings of a new optimizer; ranges are checked where the dtypes are known, by `State.set`.

    Raises:
        OptserveError: INVALID_FIELD, UNKNOWN_PARAMETER or DUPLICATE_PARAMETER.
    """
    method, kind = rule(message.algorithm), kind_of(message)
    return Settings(
        method,
        _schedule(message),
        _clipping(message),
        groups(message.groups, method, kind, layout),
        message.mode == optimizer_pb2.MODE_HOSTED,
        decay_of(message, kind),
        _consistency(message),
        kind,
    )


def _consistency(message: optimizer_pb2.Optimizer) -> Consistency | None:
    if not message.HasField("consistency"):
        return None
    given = message.consistency
    kind = given.WhichOneof("kind")
    if kind is None:
        raise OptserveError(
            Reason.INVALID_FIELD, "Choose a consistency: async, bounded or sync.", field="optimizer.consistency"
        )
    own = getattr(given, kind)
    return CONSISTENCIES[kind](
        lease_s=given.lease.seconds + given.lease.nanos / 1e9 if given.HasField("lease") else LEASE_S,
        scale_by_staleness=given.scale_by_staleness,
        **{field.name: getattr(own, field.name) for field in own.DESCRIPTOR.fields},
    )


def _schedule(message: optimizer_pb2.Optimizer) -> Schedule | None:
    if not message.HasField("schedule"):
        return None
    name = message.schedule.WhichOneof("kind")
    if name is None:
        kinds = ", ".join(SCHEDULES)
        raise OptserveError(Reason.INVALID_FIELD, f"Choose a schedule: {kinds}.", field="optimizer.schedule")
    given = getattr(message.schedule, name)
    values = {field.name: getattr(given, field.name) for field in given.DESCRIPTOR.fields}
    if "milestones" in values:
        values["milestones"] = tuple(values["milestones"])
    if name == "exponential":
        values["period_steps"] = values["period_steps"] or 1
    return SCHEDULES[name](warmup_steps=message.schedule.warmup_steps, **values)


def _clipping(message: optimizer_pb2.Optimizer) -> Clipping | None:
    if not message.HasField("clipping"):
        return None
    kind = message.clipping.WhichOneof("bound")
    if kind is None:
        raise OptserveError(
            Reason.INVALID_FIELD, "Choose a bound: value, norm or global_norm.", field="optimizer.clipping"
        )
    return Clipping(kind, getattr(message.clipping, kind))


def groups(
    given: Sequence[optimizer_pb2.ParameterGroup],
    method: Rule,
    kind: DecayKind,
    layout: Layout,
    field: str = "optimizer.groups",
) -> tuple[Group, ...]:
    """The groups that messages describe, of the parameters of `layout`; `kind` is that of their weight decays.

    Raises:
        OptserveError: INVALID_FIELD, UNKNOWN_PARAMETER or DUPLICATE_PARAMETER.
    """
    made: list[Group] = []
    seen: set[int] = set()
    for position, group in enumerate(given):
        path = f"{field}[{position}]"
        if group.algorithm.WhichOneof("method") not in (None, method.name):
            raise OptserveError(
                Reason.INVALID_FIELD, f"The method of a group is that of the optimizer, {method.name}.",
                field=f"{path}.algorithm",
            )  # fmt: skip
        if not group.parameters:
            raise OptserveError(Reason.INVALID_FIELD, "A group has at least one parameter.", field=f"{path}.parameters")
        indices: list[int] = []
        for name in group.parameters:
            index = layout.indices.get(name)
            if index is None:
                raise OptserveError(
                    Reason.UNKNOWN_PARAMETER, f"There is no parameter {name[:100]!r}.",
                    field=f"{path}.parameters", parameter=name,
                )  # fmt: skip
            if index in seen:
                raise OptserveError(
                    Reason.DUPLICATE_PARAMETER, f"{name!r} is in two groups, or twice in one.",
                    field=f"{path}.parameters", parameter=name,
                )  # fmt: skip
            seen.add(index)
            indices.append(index)
        own = getattr(group.algorithm, method.name)
        overrides = {item.name: getattr(own, item.name) for item in fields(method) if own.HasField(item.name)}
        made.append(Group(tuple(indices), overrides, own_decay_of(group, kind, path)))
    return tuple(made)


def step_settings(messages: Sequence[steps_pb2.StepSettings], item: Optimizer) -> StepSettings:
    """The settings of a step. What depends on the present groups is checked by `StepSettings.checked_rules`.

    Raises:
        OptserveError: INVALID_FIELD, for another method, or for more settings than the optimizer can have groups.
    """
    most = len(item.layout.parameters) + 1
    if len(messages) > most:
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"The step has {len(messages)} settings; each is for another group, and there are at most {most}.",
            field="settings",
        )
    method, kind, changes = item.rule, item.settings.decay_kind, []
    for number, message in enumerate(messages):
        if message.algorithm.WhichOneof("method") not in (None, method.name):
            raise OptserveError(
                Reason.INVALID_FIELD, f"The method of a step is that of the optimizer, {method.name}.",
                field=f"settings[{number}].algorithm",
            )  # fmt: skip
        given = getattr(message.algorithm, method.name)
        changes.append(
            Change(
                message.group if message.HasField("group") else None,
                {item.name: getattr(given, item.name) for item in fields(method) if given.HasField(item.name)},
                own_decay_of(message, kind, f"settings[{number}]"),
            )
        )
    return StepSettings(tuple(changes), kind)


def step_options(request: steps_pb2.Begin | steps_pb2.ApplyGradientsRequest, item: Optimizer) -> StepOptions:
    """What a step asks for beside its reply; raises INVALID_FIELD, see `step_settings`."""
    settings = request.settings
    if not settings and not request.with_gradient_norm and not request.etag:
        return PLAIN
    return StepOptions(step_settings(settings, item) if settings else None, request.with_gradient_norm, request.etag)


def rule(message: algorithms_pb2.Algorithm, path: str = "optimizer.algorithm") -> Rule:
    """The method with its hyper-parameters, defaults filled in, or raise INVALID_FIELD.

    Ranges are checked where the dtype is known, by `Rule.check`.
    """
    name = message.WhichOneof("method")
    if name is None:
        raise OptserveError(Reason.INVALID_FIELD, f"Choose a method: this server has {', '.join(RULES)}.", field=path)
    given = getattr(message, name)
    values = {item.name: getattr(given, item.name) for item in fields(RULES[name]) if given.HasField(item.name)}
    return RULES[name](**values)


def updated_settings(present: Settings, layout: Layout, message: optimizer_pb2.Optimizer, paths: list[str]) -> Settings:
    """The settings with the fields named by an update mask taken from `message`, or raise INVALID_FIELD."""
    method = message.algorithm.WhichOneof("method")
    if method not in (None, present.rule.name):
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"The method is fixed at creation; it is {present.rule.name}, not {method}.",
            field="optimizer.algorithm",
        )
    names = [item.name for item in fields(present.rule)]
    prefix = f"algorithm.{present.rule.name}"
    # What each path changes of the rule.
    changes = {"algorithm": names, prefix: names} | {f"{prefix}.{name}": [name] for name in names}
    changes |= {name: [] for name in ("schedule", "clipping", "groups", *PATHS, "consistency")}
    for path in paths or [""]:
        if path not in changes:
            what = f"{path!r} cannot be updated" if path else "Name the fields to change"
            raise OptserveError(
                Reason.INVALID_FIELD, f"{what}; these can be: {', '.join(changes)}.", field="update_mask"
            )
    changed = {name for path in paths for name in changes[path]}
    after = present.rule
    if changed:
        given = rule(message.algorithm)
        after = replace(after, **{name: getattr(given, name) for name in changed})
    decay, kind = updated_decay(present, message, paths)
    return Settings(
        after,
        _schedule(message) if "schedule" in paths else present.schedule,
        _clipping(message) if "clipping" in paths else present.clipping,
        groups(message.groups, after, kind, layout) if "groups" in paths else present.groups,
        present.hosted,
        decay,
        _consistency(message) if "consistency" in paths else present.consistency,
        kind,
    )


def set_settings(message: optimizer_pb2.Optimizer, present: Settings, layout: Layout) -> None:
    """Make a message say all settings, every default filled in."""
    set_algorithm(message.algorithm, present.rule)
    set_decay(message, present)
    if present.schedule is not None:
        schedule = present.schedule.values()
        message.schedule.warmup_steps = schedule.pop("warmup_steps")
        getattr(message.schedule, present.schedule.kind).SetInParent()
        for name, value in schedule.items():
            kind = getattr(message.schedule, present.schedule.kind)
            if isinstance(value, tuple):
                getattr(kind, name).extend(value)
            else:
                setattr(kind, name, value)
    if present.clipping is not None:
        setattr(message.clipping, present.clipping.kind, present.clipping.bound)
    if present.consistency is not None:
        consistency = present.consistency
        message.consistency.lease.FromNanoseconds(int(consistency.lease_s * 1e9))
        message.consistency.scale_by_staleness = consistency.scale_by_staleness
        kind = getattr(message.consistency, consistency.kind)
        kind.SetInParent()
        for name, value in consistency.values().items():
            setattr(kind, name, value)
    for group in present.groups:
        names = [layout.parameters[index].name for index in group.parameters]
        shown = message.groups.add(parameters=names)
        set_own_decay(shown, present.decay_kind, group.weight_decay)
        overridden = getattr(shown.algorithm, present.rule.name)
        overridden.SetInParent()
        for name, value in group.overrides.items():
            setattr(overridden, name, value)


def set_algorithm(message: algorithms_pb2.Algorithm, rule: Rule) -> None:
    """Make a message say a rule with all of its hyper-parameters."""
    settings = getattr(message, rule.name)
    settings.SetInParent()
    for name, value in asdict(rule).items():
        setattr(settings, name, value)
