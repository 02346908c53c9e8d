"""Schedules: a factor on the learning rate that changes over the steps. Section 2.1 of the paper."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.rules.base import Range


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate at step t, the number of steps applied before. Use a subclass.

    Attributes:
        warmup_steps: Steps of linear warm-up before the schedule starts, with its own t from 0 on.
    """

    kind: ClassVar[str]
    ranges: ClassVar[dict[str, str]] = {}

    warmup_steps: int = 0

    def factor(self, t: int) -> float:
        """The factor at step t, in [0, 1]: (t + 1) / (warmup_steps + 1) during the warm-up.

        It is never more than 1, because bounds that hold for the learning rate must hold at every step.
        """
        if t < self.warmup_steps:
            return (t + 1) / (self.warmup_steps + 1)
        return self.annealed(t - self.warmup_steps)

    def annealed(self, t: int) -> float:
        """The factor after the warm-up."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise HYPERPARAMETER_OUT_OF_RANGE, with the field's path, for an impossible value."""
        for name, interval in self.ranges.items():
            value = getattr(self, name)
            if value not in Range(interval) or not math.isfinite(value):
                raise self.impossible(name, f"{value!r}, but must lie in {interval}")

    def impossible(self, name: str, what: str) -> OptserveError:
        """The error for an impossible value of a field."""
        return OptserveError(
            Reason.HYPERPARAMETER_OUT_OF_RANGE,
            f"The {name} of the {self.kind.replace('_', ' ')} schedule is {what}.",
            field=f"optimizer.schedule.{self.kind}.{name}",
        )

    def to_json(self) -> dict[str, Any]:
        """The form on disk."""
        return {"kind": self.kind, **self.values()}

    def values(self) -> dict[str, Any]:
        """The values by field name. Not by `asdict`, which would copy every milestone and take seconds."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class Constant(Schedule):
    """The factor is always 1."""

    kind = "constant"

    def annealed(self, t: int) -> float:  # noqa: ARG002
        """See Schedule."""
        return 1.0


@dataclass(frozen=True)
class InverseTime(Schedule):
    """1 / (1 + decay t): 1 / t annealing, Robbins and Monro (1951)."""

    kind = "inverse_time"
    ranges: ClassVar[dict[str, str]] = {"decay": "(0, inf)"}

    decay: float = 0.0

    def annealed(self, t: int) -> float:
        """See Schedule."""
        return 1.0 / (1.0 + self.decay * t)


@dataclass(frozen=True)
class Exponential(Schedule):
    """rate ^ (t / period_steps)."""

    kind = "exponential"
    ranges: ClassVar[dict[str, str]] = {"rate": "(0, 1]", "period_steps": "[1, inf)"}

    rate: float = 0.0
    period_steps: int = 1

    def annealed(self, t: int) -> float:
        """See Schedule."""
        return self.rate ** (t / self.period_steps)


@dataclass(frozen=True)
class AtSteps(Schedule):
    """rate ^ (number of milestones that are at most t)."""

    kind = "step"
    ranges: ClassVar[dict[str, str]] = {"rate": "(0, 1]"}

    rate: float = 0.0
    milestones: tuple[int, ...] = ()

    def check(self) -> None:
        """See Schedule. There must be milestones, in increasing order."""
        super().check()
        if not self.milestones:
            raise self.impossible("milestones", "empty; name at least one step")
        if any(earlier >= later for earlier, later in pairwise(self.milestones)):
            raise self.impossible("milestones", "not strictly increasing")

    def annealed(self, t: int) -> float:
        """See Schedule."""
        return self.rate ** bisect_right(self.milestones, t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """floor + (1 − floor) (1 + cos(π t / period_steps)) / 2, and floor from period_steps on."""

    kind = "cosine"
    ranges: ClassVar[dict[str, str]] = {"period_steps": "[1, inf)", "floor": "[0, 1]"}

    period_steps: int = 0
    floor: float = 0.0

    def annealed(self, t: int) -> float:
        """See Schedule."""
        past = min(t / self.period_steps, 1.0)
        return self.floor + (1.0 - self.floor) * (1.0 + math.cos(math.pi * past)) / 2.0


SCHEDULES: dict[str, type[Schedule]] = {
    kind.kind: kind for kind in (Constant, InverseTime, Exponential, AtSteps, Cosine)
}
"""Every schedule by its field name in `optserve.v1.Schedule`."""


def schedule_from(content: dict[str, Any]) -> Schedule:
    """The reverse of `Schedule.to_json`."""
    values: dict[str, Any] = dict(content)
    if "milestones" in values:
        # JSON has no tuples.
        values["milestones"] = tuple(values["milestones"])
    return SCHEDULES[values.pop("kind")](**values)
