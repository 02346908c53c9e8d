"""Settings for one step, in the place of the optimizer's or of a group's. They change nothing of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.settings import Settings, UnknownSettingError
from optserve_server.numerics.weight_decay import DecayKind, check_decay


class Change(NamedTuple):
    """What is different for some parameters.

    Attributes:
        group: Whose: 0 for the parameters in no group, i for those of the group at position i - 1; None for all.
        overrides: Hyper-parameters by name; the others stay as they are.
        weight_decay: Weight decay; None to leave it as it is.
    """

    group: int | None
    overrides: Mapping[str, Any]
    weight_decay: float | None = None

    def positions(self, count: int) -> Iterator[int]:
        """The positions among `count` rules that it concerns."""
        yield from range(count) if self.group is None else (self.group,)


@dataclass(frozen=True)
class StepSettings:
    """The settings of one step.

    Attributes:
        changes: What is different, in the order of the request. Either each for another group, or one for all.
        decay_kind: The kind of the weight decays; None in a record, whose step was checked.
    """

    changes: tuple[Change, ...]
    decay_kind: DecayKind | None = None

    def __post_init__(self) -> None:
        # −0 equals 0 but gives other bits, so settings that are equal would give different steps.
        object.__setattr__(self, "changes", tuple(map(_without_negative_zeros, self.changes)))

    def checked_rules(self, settings: Settings, dtypes: Sequence[np.dtype]) -> list[Rule]:
        """The rules of the step, checked as an optimizer's own settings are checked.

        Args:
            settings: The present settings of the optimizer.
            dtypes: The dtypes of its parameters.

        Raises:
            OptserveError: INVALID_FIELD or HYPERPARAMETER_OUT_OF_RANGE. `field` begins with `settings[i]`.
        """
        if settings.consistency is not None and settings.consistency.merges:
            raise OptserveError(
                Reason.INVALID_FIELD,
                "With this consistency several workers make a step together, so it cannot have settings of one of "
                "them; change the optimizer's with UpdateOptimizer.",
                field="settings",
            )
        if self.decay_kind not in (None, settings.decay_kind) and any(
            change.weight_decay is not None for change in self.changes
        ):
            # An update has come between the request and its step.
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"The optimizer's weight decay is of the kind {settings.decay_kind.value} now, and this step's is not.",
                field="settings",
            )
        own, seen = settings.rules(), set[int]()
        for number, change in enumerate(self.changes):
            self._check_group(f"settings[{number}].group", change.group, seen, len(own))
        rules, decays = self.rules(own), self.decays(settings.decays())
        for number, change in enumerate(self.changes):
            path, whose = f"settings[{number}]", _name_of(change.group)
            for position in change.positions(len(rules)) if change.overrides else ():
                _check_rule(rules[position], dtypes, path, whose)
            # A larger learning rate may be too large for the decay that it is multiplied by.
            for position in change.positions(len(rules)):
                check_decay(settings, decays[position], rules[position], f"{path}.weight_decay", whose)
        return rules

    def _check_group(self, field: str, group: int | None, seen: set[int], count: int) -> None:
        if group is None:
            if len(self.changes) > 1:
                raise OptserveError(
                    Reason.INVALID_FIELD,
                    "Settings without a group are for all parameters, so a step has no others beside them.",
                    field=field,
                )
        elif group >= count:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"There is no group {group}; the optimizer has {count - 1}. 0 stands for the parameters in no group.",
                field=field,
            )
        elif group in seen:
            raise OptserveError(Reason.INVALID_FIELD, f"Group {group} has settings twice.", field=field)
        else:
            seen.add(group)

    def rules(self, rules: Sequence[Rule]) -> list[Rule]:
        """The rules of the step.

        Args:
            rules: The optimizer's own, see `Settings.rules`.

        Raises:
            UnknownSettingError: The method has no such hyper-parameter, or the optimizer no such group.
        """
        made = list(rules)
        for change in self.changes:
            for position in change.positions(len(made)) if change.overrides else ():
                try:
                    made[position] = replace(made[position], **change.overrides)
                except (TypeError, IndexError) as error:
                    raise UnknownSettingError(f"this server does not know {change} of a step: {error}") from error
        return made

    def decays(self, decays: Sequence[float]) -> list[float]:
        """The weight decays of the step; `decays` are the optimizer's own, see `Settings.decays`."""
        made = list(decays)
        for change in self.changes:
            for position in change.positions(len(made)) if change.weight_decay is not None else ():
                made[position] = change.weight_decay or 0.0
        return made

    def to_json(self) -> list[Any]:
        """The form on disk."""
        return [[change.group, dict(change.overrides), change.weight_decay] for change in self.changes]

    @classmethod
    def from_json(cls, content: Sequence[Sequence[Any]]) -> Self:
        """The reverse of `to_json`; raises ValueError for a change of another form."""
        return cls(tuple(Change(group, overrides, decay) for group, overrides, decay in content))


class StepOptions(NamedTuple):
    """What a step asks for beside its reply.

    Attributes:
        settings: Settings for this step only; None for the optimizer's own.
        with_norm: Whether to compute the norm of the gradient.
        etag: Of the optimizer whose groups the settings name; empty to leave it unchecked.
    """

    settings: StepSettings | None = None
    with_norm: bool = False
    etag: str = ""


PLAIN = StepOptions()
"""A step with the optimizer's own settings."""


class StepPoint(NamedTuple):
    """What the constants of a step depend on.

    Attributes:
        step: Number of steps applied before.
        staleness: Staleness by which the learning rate is divided; 0 for no scaling.
        settings: Settings for this step only.
    """

    step: int
    staleness: int = 0
    settings: StepSettings | None = None


def _without_negative_zeros(change: Change) -> Change:
    overrides = {name: value or type(value)() for name, value in change.overrides.items()}
    decay = change.weight_decay
    return Change(change.group, overrides, None if decay is None else decay or 0.0)


def _check_rule(rule: Rule, dtypes: Sequence[np.dtype], path: str, whose: str) -> None:
    for dtype in dtypes:
        try:
            rule.check(dtype)
        except OptserveError as error:
            field = error.field.replace("optimizer", path, 1)
            raise OptserveError(error.reason, f"{error.message.removesuffix('.')}{whose}.", field=field) from None


def _name_of(group: int | None) -> str:
    """Whose settings these are, as the end of a sentence."""
    if group is None:
        return ", in the settings of this step"
    return f", in this step's settings of {f'group {group}' if group else 'the parameters in no group'}"
