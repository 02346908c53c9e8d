"""The constants of the rule for each part of an arena.

They depend on the groups of parameters, and on the steps that each parameter has taken part in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Self

import numpy as np

from optserve_server.numerics.backends.base import Decay, DecayPlace
from optserve_server.numerics.layout import Layout, Run
from optserve_server.numerics.parameter_steps import ParameterSteps
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.rules.base import NUMBERS, Scalars
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.step_settings import StepSettings
from optserve_server.numerics.weight_decay import DecayKind

FIRST_STEP = 1
"""A parameter's step counter in the first step that it takes part in."""

ROOM = 2.0
"""How many times larger learning rates may become before bounds are computed anew."""

_MOST = min(numbers.most for numbers in NUMBERS.values())

Row = Sequence[np.generic]
"""The constants of one rule, rounded to a dtype."""

Part = tuple[slice, int, int]
"""(part of an arena, position among the rules, step counter; 0 if the rule does not use it): it has one row."""


class Rows:
    """The constants of one step, for a rule that does not use step counters.

    Args:
        rows: The rows of each dtype, by position among the rules.
        learning_rates: The learning rate of each rule, in float64; empty if the method has none.
    """

    def __init__(self, rows: Mapping[np.dtype, Sequence[Row]], learning_rates: tuple[float, ...]) -> None:
        self._rows = rows
        self.learning_rates = learning_rates

    def of(self, dtype: np.dtype, position: int, counter: int) -> Row:  # noqa: ARG002
        """The row of a part."""
        return self._rows[dtype][position]


class CountedRows(Rows):
    """The constants of one step, for a rule that uses step counters. Each row is made when it is needed.

    Args:
        rules: The rules of the step.
        learning_rates: See Rows.
    """

    def __init__(self, rules: Sequence[Rule], learning_rates: tuple[float, ...]) -> None:
        super().__init__({}, learning_rates)
        self._rules = rules
        self._made: dict[tuple[np.dtype, int, int], Row] = {}

    def of(self, dtype: np.dtype, position: int, counter: int) -> Row:
        """The row of a part."""
        key = (dtype, position, counter)
        row = self._made.get(key)
        if row is None:
            row = self._made[key] = _rounded(self._rules[position], dtype, counter)
        return row


class Constants:
    """The constants of an optimizer's present settings, or of one step's.

    Args:
        layout: The model.
        settings: The present settings.
        rules: See `Settings.rules`.

    Attributes:
        settings: The present settings.
        parameter_count: Number of parameters of the model.
        rules: The rules, without a schedule.
        first: The constants at a parameter's first step, without a schedule, for each dtype and rule.
    """

    def __init__(self, layout: Layout, settings: Settings, rules: Sequence[Rule]) -> None:
        self.settings = settings
        self.parameter_count = len(layout.parameters)
        self._dtypes = layout.dtypes
        # Settings are checked for some dtype also if all parameters are empty.
        self._all_dtypes = self._dtypes or list(layout.sizes)
        self._position_of = {
            index: position for position, group in enumerate(settings.groups, 1) for index in group.parameters
        }
        self._stretches = {dtype: self._stretches_of(layout, dtype) for dtype in self._dtypes}
        self._stops = {dtype: [stop for _, stop, _ in found] for dtype, found in self._stretches.items()}
        self._set(rules, settings.decays())

    def _set(self, rules: Sequence[Rule], decays: Sequence[float]) -> None:
        self.rules, self._decays = rules, decays
        self.first = self._rows(rules)
        # Without a schedule the constants never change.
        self._rates = None if self.settings.schedule else self.settings.learning_rates(rules, 0, 0)
        self._always = None if self._rates is None else Rows(self.first, self._rates)

    @property
    def first_scalars(self) -> dict[np.dtype, list[Scalars]]:
        """`first` as plain numbers, for bounds."""
        return {dtype: [tuple(map(float, row)) for row in rows] for dtype, rows in self.first.items()}

    def of_step(self, settings: StepSettings) -> Self:
        """The constants of a step with settings of its own.

        Raises:
            OptserveError: See `StepSettings.checked_rules`.
        """
        changed = copy(self)
        changed._set(settings.checked_rules(self.settings, self._all_dtypes), settings.decays(self._decays))
        return changed

    def with_room(self) -> Self:
        """The same, with larger learning rates: bounds for these still hold when the rates have grown."""
        changed = copy(self)
        with np.errstate(over="ignore"):
            changed._set([_with_room(rule) for rule in self.rules], self._decays)
        return changed

    def are_bounded_by(self, others: Self) -> bool:
        """Whether bounds for `others`, of the same optimizer, hold for these constants too."""
        return self.added_decay <= others.added_decay and all(map(Rule.is_bounded_by, self.rules, others.rules))

    def _learning_rates(self, step: int, staleness: int) -> tuple[float, ...]:
        if self._rates is not None and not staleness:
            return self._rates
        return self.settings.learning_rates(self.rules, step, staleness)

    def _stretches_of(self, layout: Layout, dtype: np.dtype) -> list[tuple[int, int, int]]:
        """(start, stop, position among the rules) of each stretch of an arena that has one rule."""
        stretches: list[tuple[int, int, int]] = []
        for index, parameter in enumerate(layout.parameters):
            if parameter.dtype != dtype or not parameter.size:
                continue
            start, position = layout.starts[index], self._position_of.get(index, 0)
            if stretches and stretches[-1][2] == position:
                start = stretches.pop()[0]
            stretches.append((start, layout.starts[index] + parameter.size, position))
        return stretches

    def _rows(self, rules: Sequence[Rule]) -> dict[np.dtype, list[Row]]:
        return {dtype: [_rounded(rule, dtype, FIRST_STEP) for rule in rules] for dtype in self._dtypes}

    def at(self, step: int, staleness: int) -> Rows:
        """The constants at a step, for gradients that are `staleness` steps old."""
        if self._always is not None and not staleness:
            return self._always
        rules = [self.settings.at(rule, step, staleness) for rule in self.rules]
        return Rows(self._rows(rules), self._learning_rates(step, staleness))

    def decay(self, dtype: np.dtype, position: int, step: int, staleness: int) -> Decay:
        """The weight decay of a step. What is taken off x is divided by staleness as the learning rate is.

        Otherwise the decay would grow with the number of workers, and the updates that it balances would not.
        """
        factor, kind, place = self._decays[position], self.settings.decay_kind, DecayPlace.PARAMETERS
        if kind is DecayKind.L2:
            place = DecayPlace.GRADIENT
        elif kind is DecayKind.TIMES_LEARNING_RATE:
            rule: Any = self.rules[position]
            if self._rates is None or staleness:
                rule = self.settings.at(rule, step, staleness)
            factor = rule.learning_rate * factor
        else:
            factor = factor / (1 + staleness)
        rounded = dtype.type(factor)
        return Decay(place if rounded else DecayPlace.NOWHERE, rounded)

    @property
    def added_decay(self) -> float:
        """The largest weight decay that is added to gradients."""
        return max(self._decays) if self.settings.decay_kind is DecayKind.L2 else 0.0

    def rule_of(self, tensor: int, step: int, staleness: int) -> Rule:
        """The rule of a parameter at a step, with the learning rate of that step."""
        return self.settings.at(self.rules[self._position_of.get(tensor, 0)], step, staleness)

    def parts_of(self, run: Run, parameter_steps: ParameterSteps) -> Sequence[Part]:  # noqa: ARG002
        """The parts of a run that have one row of constants each.

        Args:
            run: A stretch of an arena.
            parameter_steps: Steps that each parameter has taken part in before.
        """
        stretches = self._stretches[run.dtype]
        if len(stretches) == 1:
            return ((slice(run.start, run.stop), stretches[0][2], 0),)
        parts: list[Part] = []
        # Begins at the first stretch of the run by bisection, because a model may have as many runs as stretches.
        for number in range(bisect_right(self._stops[run.dtype], run.start), len(stretches)):
            start, stop, position = stretches[number]
            if start >= run.stop:
                break
            parts.append((slice(max(start, run.start), min(stop, run.stop)), position, 0))
        return parts


class CountedConstants(Constants):
    """The constants for a rule that uses step counters. A run is split where the counters differ, or the groups."""

    def __init__(self, layout: Layout, settings: Settings, rules: Sequence[Rule]) -> None:
        super().__init__(layout, settings, rules)
        self._tensors: dict[np.dtype, np.ndarray] = {}
        self._bounds: dict[np.dtype, tuple[np.ndarray, np.ndarray]] = {}
        self._positions: dict[np.dtype, np.ndarray] = {}
        for dtype in self._dtypes:
            own = [i for i, parameter in enumerate(layout.parameters) if parameter.dtype == dtype and parameter.size]
            starts = np.array([layout.starts[index] for index in own])
            self._tensors[dtype] = np.array(own)
            self._bounds[dtype] = starts, starts + [layout.parameters[index].size for index in own]
            self._positions[dtype] = np.array([self._position_of.get(index, 0) for index in own])

    def at(self, step: int, staleness: int) -> Rows:
        """See Constants. Each step has new constants, so none are kept."""
        rules = [self.settings.at(rule, step, staleness) for rule in self.rules]
        return CountedRows(rules, self._learning_rates(step, staleness))

    def parts_of(self, run: Run, parameter_steps: ParameterSteps) -> Sequence[Part]:
        """See Constants."""
        if parameter_steps.shared is not None:
            counter = parameter_steps.shared + FIRST_STEP
            return [(part, position, counter) for part, position, _ in super().parts_of(run, parameter_steps)]
        starts, stops = self._bounds[run.dtype]
        there = slice(int(np.searchsorted(stops, run.start, "right")), int(np.searchsorted(starts, run.stop, "left")))
        positions = self._positions[run.dtype][there]
        counters = parameter_steps.each[self._tensors[run.dtype][there]]
        borders = np.flatnonzero((np.diff(counters) != 0) | (np.diff(positions) != 0)) + 1
        starts, stops = starts[there], stops[there]
        return [
            (
                slice(max(int(starts[first]), run.start), min(int(stops[end - 1]), run.stop)),
                int(positions[first]),
                int(counters[first]) + FIRST_STEP,
            )
            for first, end in zip((0, *borders.tolist()), (*borders.tolist(), positions.size), strict=True)
        ]


def constants_of(layout: Layout, settings: Settings, rules: Sequence[Rule]) -> Constants:
    """The constants of settings, for a rule of either kind."""
    kind = CountedConstants if settings.rule.counts_steps else Constants
    return kind(layout, settings, rules)


def _with_room(rule: Rule) -> Rule:
    rate = getattr(rule, "learning_rate", None)
    if rate is None:
        return rule
    return replace(rule, **{"learning_rate": max(rate, min(ROOM * rate, _MOST))})


def _rounded(rule: Rule, dtype: np.dtype, counter: int) -> Row:
    return rule.constants(dtype, counter)
