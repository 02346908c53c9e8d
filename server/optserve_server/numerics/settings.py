"""The settings of an optimizer: its method, and all other settings. They can change while the state stays."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.clipping import CLIPPINGS, Clipping
from optserve_server.numerics.consistency import CONSISTENCIES, Consistency
from optserve_server.numerics.rules import RULES, Rule
from optserve_server.numerics.schedule import SCHEDULES, Schedule, schedule_from
from optserve_server.numerics.weight_decay import DecayKind, check_decay

PARAMETER = "parameter"
"""Name of x among the arrays of a state; no rule has a slot of that name."""

T = TypeVar("T")


class UnknownSettingError(ValueError):
    """Settings on disk have a field or a kind that this server does not know. The message names it."""


@dataclass(frozen=True)
class Group:
    """Parameters whose hyper-parameters differ from the optimizer's.

    Attributes:
        parameters: Their indices.
        overrides: Hyper-parameters by name; the others are those of the optimizer.
        weight_decay: Weight decay; None for that of the optimizer.
    """

    parameters: tuple[int, ...]
    overrides: dict[str, Any] = field(hash=False)
    weight_decay: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The form on disk."""
        # Not by `asdict`, which would copy every index.
        return {"parameters": self.parameters, "overrides": dict(self.overrides), "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class Settings:
    """The settings of one optimizer.

    Attributes:
        rule: The method, whose kind is fixed at creation, with its hyper-parameters.
        schedule: Schedule of the learning rate; None for a constant rate.
        clipping: Clipping of the gradient; None for no clipping.
        groups: Groups of parameters. No parameter is in two groups.
        hosted: Whether the server holds the parameters x as well; fixed at creation.
        weight_decay: Decay of x per step, of the kind that `decay_kind` says.
        consistency: When the steps of several workers are applied; None for one client at a time.
        decay_kind: What the weight decay does, in every group.
    """

    rule: Rule
    schedule: Schedule | None = None
    clipping: Clipping | None = None
    groups: tuple[Group, ...] = ()
    hosted: bool = False
    weight_decay: float = 0.0
    consistency: Consistency | None = None
    decay_kind: DecayKind = DecayKind.FIXED

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays of the state: the slots, then x in hosted mode."""
        return (*self.rule.slots, PARAMETER) if self.hosted else self.rule.slots

    def check(self) -> None:
        """Raise HYPERPARAMETER_OUT_OF_RANGE or INVALID_FIELD for settings that are impossible for every dtype."""
        if self.schedule is not None:
            self.schedule.check()
            self._check_rate("follow a schedule", "optimizer.schedule")
        if self.clipping is not None:
            self.clipping.check()
        if self.consistency is not None:
            self.consistency.check()
            if not self.hosted:
                raise OptserveError(
                    Reason.INVALID_FIELD,
                    "Workers share the parameters that the server holds; create the optimizer in hosted mode.",
                    field="optimizer.consistency",
                )
            if self.consistency.scale_by_staleness:
                self._check_rate("be scaled by staleness", "optimizer.consistency.scale_by_staleness")
        if self.decay_kind is not DecayKind.FIXED and not self.hosted:
            raise OptserveError(
                Reason.INVALID_FIELD,
                "weight_decay needs parameters that the server holds; in delta mode add it to the gradient.",
                field="optimizer.weight_decay_kind",
            )
        for decay, rule in zip(self.decays(), self.rules(), strict=True):
            check_decay(self, decay, rule, "optimizer.weight_decay")

    def _check_rate(self, what: str, field: str) -> None:
        if not hasattr(self.rule, "learning_rate"):
            raise OptserveError(
                Reason.INVALID_FIELD, f"{self.rule.name} has no learning rate that could {what}.", field=field
            )

    def decays(self) -> list[float]:
        """The weight decay of the parameters in no group, then that of each group."""
        own = self.weight_decay
        return [own, *(own if group.weight_decay is None else group.weight_decay for group in self.groups)]

    def rules(self) -> list[Rule]:
        """The rule of the parameters in no group, then the rule of each group."""
        return [self.rule, *(replace(self.rule, **group.overrides) for group in self.groups)]

    def at(self, rule: Rule, step: int, staleness: int = 0) -> Rule:
        """One of `rules` with the learning rate of a step, for a gradient that is `staleness` steps old."""
        if self.schedule is None and not staleness:
            return rule
        return replace(rule, **{"learning_rate": self._rate(rule, self._factor(step), staleness)})

    def learning_rates(self, rules: Sequence[Rule], step: int, staleness: int) -> tuple[float, ...]:
        """The learning rates of `rules` at a step, as `at` has them; empty if the method has none."""
        if not hasattr(self.rule, "learning_rate"):
            return ()
        factor = self._factor(step)
        return tuple(self._rate(rule, factor, staleness) for rule in rules)

    def _factor(self, step: int) -> float:
        return 1.0 if self.schedule is None else self.schedule.factor(step)

    @staticmethod
    def _rate(rule: Rule, factor: float, staleness: int) -> float:
        return getattr(rule, "learning_rate") * factor / (1 + staleness)  # noqa: B009 - not every rule has one

    @property
    def summary(self) -> str:
        """A line for the log, however many groups and milestones there are."""
        parts = [f"{self.rule}"]
        parts += [type(self.schedule).__name__] if self.schedule else []
        parts += [f"{self.clipping}"] if self.clipping else []
        parts += [f"{len(self.groups)} groups"] if self.groups else []
        parts += [f"hosted, weight decay {self.weight_decay} {self.decay_kind.value}"] if self.hosted else []
        parts += [f"{self.consistency}"] if self.consistency else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The form on disk."""
        content: dict[str, Any] = {"rule": {"name": self.rule.name, **asdict(self.rule)}}
        if self.schedule is not None:
            content["schedule"] = self.schedule.to_json()
        if self.clipping is not None:
            content["clipping"] = asdict(self.clipping)
        if self.groups:
            content["groups"] = [group.to_json() for group in self.groups]
        if self.hosted:
            fixed = self.decay_kind is DecayKind.FIXED
            # A mapping is refused by servers and clients that know only the fixed kind, which is a number.
            decay = self.weight_decay if fixed else {"kind": self.decay_kind.value, "factor": self.weight_decay}
            content |= {"hosted": True, "weight_decay": decay}
        if self.consistency is not None:
            content["consistency"] = self.consistency.to_json()
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """The reverse of `to_json`.

        `content` may have other keys beside the settings, which belong to the caller. Within a setting every field must
        be known, because an unknown field of a newer server may change the steps.

        Raises:
            UnknownSettingError: This server does not know a field of a setting, or a kind of setting.
        """
        rule = dict(content["rule"])
        kind = _kind_of("method", RULES, rule.pop("name"))
        groups = content.get("groups", ())
        for group in groups:
            _check_names("group", _names(Group), group)
            _check_names(f"{kind.name} in a group", _names(kind), group["overrides"])
        decay, decay_kind = _weight_decay(content.get("weight_decay", 0.0))
        return cls(
            _read(kind.name, kind, rule),
            _schedule(content["schedule"]) if "schedule" in content else None,
            _clipping(content["clipping"]) if "clipping" in content else None,
            tuple(Group(tuple(group["parameters"]), group["overrides"], group.get("weight_decay")) for group in groups),
            content.get("hosted", False),
            decay,
            _consistency(content["consistency"]) if "consistency" in content else None,
            decay_kind,
        )


def _names(kind: Any) -> set[str]:
    return {item.name for item in fields(kind)}


def _check_names(what: str, known: Collection[str], values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in known:
            raise UnknownSettingError(
                f"this server does not know {name!r} of {what}, which a newer server may have written"
            )


def _read(what: str, kind: type[T], values: Mapping[str, Any]) -> T:
    _check_names(what, _names(kind), values)
    return kind(**values)


def _kind_of(what: str, kinds: Mapping[str, T], name: str) -> T:
    if name not in kinds:
        raise UnknownSettingError(
            f"this server does not know the {what} {name!r}, which a newer server may have written"
        )
    return kinds[name]


def _weight_decay(written: float | Mapping[str, Any]) -> tuple[float, DecayKind]:
    if not isinstance(written, Mapping):
        return written, DecayKind.FIXED
    _check_names("weight_decay", ("kind", "factor"), written)
    kinds = {kind.value: kind for kind in DecayKind}
    return written["factor"], _kind_of("weight decay", kinds, written["kind"])


def _clipping(values: Mapping[str, Any]) -> Clipping:
    read = _read("clipping", Clipping, values)
    _kind_of("clipping", dict.fromkeys(CLIPPINGS, True), values["kind"])
    return read


def _consistency(values: Mapping[str, Any]) -> Consistency:
    kind = _kind_of("consistency", CONSISTENCIES, values["kind"])
    _check_names("consistency", kind.field_names(), values)
    return kind.from_json(values)


def _schedule(values: Mapping[str, Any]) -> Schedule:
    kind = _kind_of("schedule", SCHEDULES, values["kind"])
    _check_names(f"the {kind.kind} schedule", _names(kind) | {"kind"}, values)
    return schedule_from(dict(values))
