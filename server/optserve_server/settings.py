"""What an optimizer is set to: its method, and what goes with it. It can change while the state stays."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optserve_server.clipping import Clipping
from optserve_server.errors import OptserveError, Reason
from optserve_server.rules import RULES, Rule
from optserve_server.schedule import Schedule, schedule_from


@dataclass(frozen=True)
class Group:
    """Parameters whose hyper-parameters differ from the optimizer's.

    Attributes:
        parameters: Their indices.
        overrides: Hyper-parameters by name; the others are the optimizer's.
    """

    parameters: tuple[int, ...]
    overrides: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Settings:
    """The settings of one optimizer.

    Attributes:
        rule: The method, whose kind is fixed at creation, with its hyper-parameters.
        schedule: Of its learning rate; None for a constant one.
        clipping: Of the gradient; None for none.
        groups: No parameter is in two.
    """

    rule: Rule
    schedule: Schedule | None = None
    clipping: Clipping | None = None
    groups: tuple[Group, ...] = ()

    def check(self) -> None:
        """Raise HYPERPARAMETER_OUT_OF_RANGE or INVALID_FIELD for what is impossible whatever the dtype."""
        if self.schedule is not None:
            self.schedule.check()
            if not hasattr(self.rule, "learning_rate"):
                raise OptserveError(
                    Reason.INVALID_FIELD,
                    f"{self.rule.name} has no learning rate that could follow a schedule.",
                    field="optimizer.schedule",
                )
        if self.clipping is not None:
            self.clipping.check()

    def rules(self) -> list[Rule]:
        """That of the parameters in no group, then that of each group."""
        return [self.rule, *(replace(self.rule, **group.overrides) for group in self.groups)]

    def at(self, rule: Rule, step: int) -> Rule:
        """One of `rules` with the learning rate that it has at a step."""
        if self.schedule is None:
            return rule
        rate = getattr(rule, "learning_rate") * self.schedule.factor(step)  # noqa: B009 - not every rule has one
        return replace(rule, **{"learning_rate": rate})

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        content: dict[str, Any] = {"rule": {"name": self.rule.name, **asdict(self.rule)}}
        if self.schedule is not None:
            content["schedule"] = self.schedule.to_json()
        if self.clipping is not None:
            content["clipping"] = asdict(self.clipping)
        if self.groups:
            content["groups"] = [asdict(group) for group in self.groups]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """The reverse of `to_json`, from content that may hold more."""
        rule = dict(content["rule"])
        return cls(
            RULES[rule.pop("name")](**rule),
            schedule_from(content["schedule"]) if "schedule" in content else None,
            Clipping(**content["clipping"]) if "clipping" in content else None,
            tuple(Group(tuple(group["parameters"]), group["overrides"]) for group in content.get("groups", ())),
        )
