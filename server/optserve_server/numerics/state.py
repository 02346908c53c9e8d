"""The state of one optimizer: its slots, and how a step changes them. Generic over rules and backends.

It knows nothing of gradients on their way in, see `staging.py`, nor of steps as transactions, see
`engine/optimizer.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from optserve_server.numerics.backends import Backend
from optserve_server.numerics.clipping import Clip
from optserve_server.numerics.headroom import Answers, Bounds, Headroom
from optserve_server.numerics.layout import Arenas, Largest, Layout, Operand, Operands, Payload, Run
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.settings import PARAMETER, Settings

UPDATE = "update"
"""Name of what a step makes beside the arrays of the state; no rule has a slot of that name."""


def operands_of(rule: Rule) -> tuple[Operand, ...]:
    """What a step of that rule brings."""
    return (Operand.GRADIENT, Operand.CURVATURE) if rule.takes_curvature else (Operand.GRADIENT,)


class _LastStep(NamedTuple):
    """What the last step that was applied was made with: the settings of that time, and what follows from them."""

    settings: Settings
    rules: list[Rule]
    position_of: dict[int, int]
    step: int
    staleness: int


class Prepared(NamedTuple):
    """A step that may be applied.

    Attributes:
        clip: What clipping does to its gradient; None where there is no clipping.
        covered: Whether it is known by bounds alone that it leaves everything finite.
    """

    clip: Clip | None
    covered: bool


_COVERED = Prepared(None, True)

_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


class State:
    """Slots, all 0 at first.

    Attributes:
        layout: Of the model.
        settings: The present ones, of one method for good.
        operand_kinds: What a step brings.
        backend: Computes it.
        slots: The arenas of each slot.
        parameters: The arenas of x, in host memory, where it is hosted.
        limits: The largest magnitude with which an operand may arrive, in each dtype.

    Raises:
        OptserveError: HYPERPARAMETER_OUT_OF_RANGE.
    """

    def __init__(self, layout: Layout, settings: Settings, backend: Backend) -> None:
        self.layout = layout
        self.backend = backend
        # As a plain tuple, which a small step makes in less time.
        self._last: tuple[Settings, list[Rule], dict[int, int], int, int] | None = None
        self._dtypes = [dtype for dtype, size in layout.sizes.items() if size]
        self._headroom = Headroom(self._bounds, hosted=settings.hosted)
        self.set(settings)
        rule = settings.rule
        self.operand_kinds = operands_of(rule)
        self._kernels = {dtype: backend.kernel(type(rule), dtype) for dtype in self._dtypes}
        self.slots: dict[np.dtype, list[Any]] = {
            dtype: [backend.zeros(layout.sizes[dtype], dtype) for _ in rule.slots] for dtype in self._dtypes
        }
        self.parameters: Arenas = layout.arenas(backend.staging(layout.size_bytes)) if settings.hosted else {}

    @property
    def rule(self) -> Rule:
        """The method with its present hyper-parameters."""
        return self.settings.rule

    def check(self, settings: Settings) -> list[Rule]:
        """Raise HYPERPARAMETER_OUT_OF_RANGE or INVALID_FIELD unless it can have these settings; gives their rules."""
        settings.check()
        rules = settings.rules()
        for dtype in self._dtypes or list(self.layout.sizes):
            for rule in rules:
                rule.check(dtype)
        return rules

    def set(self, settings: Settings) -> None:
        """Change the settings; refused as a whole where one is out of range."""
        rules = self.check(settings)
        self.settings = settings
        self._rules = rules
        self._position_of = {
            index: position for position, group in enumerate(settings.groups, 1) for index in group.parameters
        }
        self.limits = {
            (operand, dtype): self._limit(operand, dtype, rules)
            for operand in operands_of(settings.rule)
            for dtype in self._dtypes
        }
        self._stretches = {dtype: self._stretches_of(dtype) for dtype in self._dtypes}
        self._stretch_stops = {dtype: [stop for _, stop, _ in found] for dtype, found in self._stretches.items()}
        self._decays = settings.decays()
        # Without a schedule the constants are always the same.
        unscheduled = self._rounded(rules)
        self._constants = None if settings.schedule else unscheduled
        self._headroom.set(
            type(settings.rule),
            {dtype: [tuple(map(float, row)) for row in rows] for dtype, rows in unscheduled.items()},
        )

    def _limit(self, operand: Operand, dtype: np.dtype, rules: Sequence[Rule]) -> float:
        if operand is Operand.GRADIENT and self.settings.clipping is not None:
            # What is too large for the rule is about to be brought down.
            return float(np.finfo(dtype).max)
        return float(dtype.type(min(rule.gradient_limit(dtype) for rule in rules)))

    def _stretches_of(self, dtype: np.dtype) -> list[tuple[int, int, int]]:
        """(start, stop, position among the rules) of the stretches of an arena that follow one rule."""
        stretches: list[tuple[int, int, int]] = []
        for index, parameter in enumerate(self.layout.parameters):
            if parameter.dtype != dtype or not parameter.size:
                continue
            start, position = self.layout.starts[index], self._position_of.get(index, 0)
            if stretches and stretches[-1][2] == position:
                start = stretches.pop()[0]
            stretches.append((start, self.layout.starts[index] + parameter.size, position))
        return stretches

    def _rounded(self, rules: Sequence[Rule]) -> dict[np.dtype, list[list[np.generic]]]:
        """The constants of each rule."""
        return {dtype: [[dtype.type(scalar) for scalar in rule.scalars()] for rule in rules] for dtype in self._dtypes}

    def _scalars(self, step: int, staleness: int) -> dict[np.dtype, list[list[np.generic]]]:
        """The constants of each rule at a step, for gradients so many steps old."""
        if self._constants and not staleness:
            return self._constants
        return self._rounded([self.settings.at(rule, step, staleness) for rule in self._rules])

    def _bounds(self) -> dict[np.dtype, Bounds]:
        """In which all elements lie, by a look at all of them."""
        return {
            dtype: Bounds(
                tuple(self.backend.extremes(slot) for slot in self.slots[dtype]),
                self.backend.largest(self.parameters[dtype]) if self.parameters else 0.0,
            )
            for dtype in self._dtypes
        }

    @staticmethod
    def required_bytes(layout: Layout, settings: Settings) -> int:
        """Bytes that a state of this layout and these settings occupies, with one staging buffer."""
        return (len(settings.arrays) + len(operands_of(settings.rule))) * layout.size_bytes

    def release(self) -> None:
        """Let go of the arrays; the state is of no further use."""
        self.slots.clear()
        self.parameters.clear()

    @property
    def backend_name(self) -> str:
        """Name of the backend that computes it."""
        return self.backend.name

    @property
    def memory_bytes(self) -> int:
        """Bytes that it occupies."""
        return self.required_bytes(self.layout, self.settings)

    def measure(self, payload: Payload, gradients: Sequence[np.ndarray]) -> Clip | None:
        """What clipping does to a step's gradients, run by run; None where there is no clipping."""
        return self.settings.clipping.measure(payload, gradients) if self.settings.clipping else None

    def prepare(self, payload: Payload, gradients: Arenas, largest: Largest, answers: Answers) -> Prepared:
        """Look at a step that is about to be applied; changes nothing.

        Args:
            payload: What takes part.
            gradients: The arenas of the gradient.
            largest: Magnitudes of the operands.
            answers: How its reply is read.
        """
        if self.settings.clipping is None:
            return _COVERED if self._headroom.covers(largest, answers) else Prepared(None, False)
        clip = self.settings.clipping.measure(payload, payload.parts(gradients))
        # Rounding may leave a little more, of the smallest numbers up to twice as much.
        bound = 1.001 * clip.bound + _SMALLEST
        clipped = {
            (operand, dtype): min(value, bound) if operand is Operand.GRADIENT else value
            for (operand, dtype), value in largest.items()
        }
        return Prepared(clip, self._headroom.covers(clipped, answers))

    def apply(
        self, operands: Operands, runs: Iterable[Run], step: int, staleness: int = 0, prepared: Prepared | None = None
    ) -> None:
        """Turn the gradients of the runs into updates, in place, and advance the slots, and x where it is hosted.

        Args:
            operands: The arenas of a staging buffer.
            runs: What takes part.
            step: Number of steps applied before, by which the learning rate is scheduled.
            staleness: By which it is scaled; 0 where it is not.
            prepared: Of `prepare`; None where nothing is clipped.
        """
        self._last = self.settings, self._rules, self._position_of, step, staleness
        scalars, clip = self._scalars(step, staleness), prepared.clip if prepared else None
        if not (prepared and prepared.covered):
            self._headroom.forget()
        for turn, run in enumerate(runs):
            if clip is not None:
                clip.apply(turn, 0, operands[Operand.GRADIENT][run.dtype][run.start : run.stop])
            for part, position in self.parts_of(run):
                slots = [slot[part] for slot in self.slots[run.dtype]]
                staged, *inputs = [arenas[run.dtype][part] for arenas in operands.values()]
                self._kernels[run.dtype](staged, slots, scalars[run.dtype][position], *inputs)
                if self.parameters:
                    decay = self._decay(run.dtype, position, staleness)
                    self.backend.advance(self.parameters[run.dtype][part], staged, decay)

    def _decay(self, dtype: np.dtype, position: int, staleness: int) -> np.floating:
        """The weight decay of a step: where its learning rate is divided for its staleness, it is too.

        Else the decay would grow with the number of workers, and not what it is to hold in balance.
        """
        return dtype.type(self._decays[position] / (1 + staleness))

    def tried(
        self, given: Sequence[np.ndarray], dtype: np.dtype, part: slice, position: int, step: int, staleness: int
    ) -> dict[str, Any]:
        """What a step would make of a part of an arena that follows one rule: all arrays by name, and the update.

        Args:
            given: The operands there, clipped; the first becomes the update.
            dtype: Of the arena.
            part: Of the arena.
            position: Of the rule among the rules.
            step: See `apply`.
            staleness: See `apply`.
        """
        slots = [self.backend.clone(slot[part]) for slot in self.slots[dtype]]
        update, *inputs = given
        self._kernels[dtype](update, slots, self._scalars(step, staleness)[dtype][position], *inputs)
        made = dict(zip(self.rule.slots, slots, strict=True)) | {UPDATE: update}
        if self.parameters:
            made[PARAMETER] = self.parameters[dtype][part].copy()
            self.backend.advance(made[PARAMETER], update, self._decay(dtype, position, staleness))
        return made

    def parts_of(self, run: Run) -> Sequence[tuple[slice, int]]:
        """(part of the arena, position among the rules) of the stretches that a run has something of."""
        stretches = self._stretches[run.dtype]
        if len(stretches) == 1:
            return ((slice(run.start, run.stop), stretches[0][2]),)
        parts: list[tuple[slice, int]] = []
        # A model may have as many runs as stretches: each run begins where its first stretch is, not at the very first.
        for turn in range(bisect_right(self._stretch_stops[run.dtype], run.start), len(stretches)):
            start, stop, position = stretches[turn]
            if start >= run.stop:
                break
            parts.append((slice(max(start, run.start), min(stop, run.stop)), position))
        return parts

    def copy_of_parameters(self) -> Arenas:
        """X as it is now."""
        copies = {dtype: np.empty_like(arena) for dtype, arena in self.parameters.items()}
        for dtype, arena in self.parameters.items():
            self.backend.copy(arena, copies[dtype])
        return copies

    def last_rule_of(self, tensor: int, step: int) -> Rule:
        """The rule that a parameter followed in the last step, with the learning rate that it had there.

        A state that came from a file or a client does not say what that step was made with: then by its settings.

        Args:
            tensor: The parameter.
            step: Number of steps applied.
        """
        last = _LastStep(*(self._last or (self.settings, self._rules, self._position_of, max(step - 1, 0), 0)))
        rule = last.rules[last.position_of.get(tensor, 0)]
        return last.settings.at(rule, last.step, last.staleness)

    def forget_last_step(self) -> None:
        """The state is another one, which that step has not made."""
        self._last = None

    def look(self, dtype: np.dtype, slot: int, where: slice | np.ndarray) -> np.ndarray:
        """A copy of elements of one arena of one slot, in float64."""
        if dtype not in self.slots:
            return np.empty(0)
        return self.backend.to_host(self.slots[dtype][slot][where]).astype(np.float64)

    def read(self, dtype: np.dtype, array: int, start: int, stop: int) -> np.ndarray:
        """A stretch of one arena of one of `Settings.arrays`, in host memory; to be used while nothing changes."""
        if array == len(self.rule.slots):
            return self.parameters[dtype][start:stop]
        return np.ascontiguousarray(self.backend.to_host(self.slots[dtype][array][start:stop]))

    def write(self, dtype: np.dtype, array: int, start: int, values: np.ndarray) -> None:
        """The reverse of `read`."""
        self._headroom.forget()
        if array == len(self.rule.slots):
            self.backend.copy(values, self.parameters[dtype][start : start + values.size])
        else:
            self.backend.fill(self.slots[dtype][array][start : start + values.size], values)

    def slot(self, tensor: int, slot: int) -> np.ndarray:
        """One slot of one parameter, in its shape."""
        parameter, start = self.layout.parameters[tensor], self.layout.starts[tensor]
        arena = self.slots[parameter.dtype][slot] if parameter.size else np.empty(0, parameter.dtype)
        return self.backend.to_host(arena[start : start + parameter.size]).reshape(parameter.shape)
