"""The state of one optimizer: its slots, and how a step changes them, for every rule and backend.

`staging.py` receives gradients. `engine/steps.py` makes a transaction of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.backends import Backend
from optserve_server.numerics.backends.base import Decay, Stretch
from optserve_server.numerics.clipping import Clip
from optserve_server.numerics.compiling import compile_ahead
from optserve_server.numerics.constants import FIRST_STEP, Constants, Part, Rows, constants_of
from optserve_server.numerics.headroom import Bounds, Headroom, ReplyWires
from optserve_server.numerics.layout import Arenas, Largest, Layout, Operand, Operands, Payload, Run, Selection
from optserve_server.numerics.parameter_steps import ParameterSteps, Written
from optserve_server.numerics.preparation import COVERED, UNCOVERED, Prepared, measure
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.settings import PARAMETER, Settings
from optserve_server.numerics.step_bounds import StepBounds
from optserve_server.numerics.step_settings import PLAIN, StepOptions, StepSettings

UPDATE = "update"
"""Name of the update among the results of a trial step; no rule has a slot of that name."""


def operands_of(rule: Rule) -> tuple[Operand, ...]:
    """The operands of a step of that rule."""
    return (Operand.GRADIENT, Operand.CURVATURE) if rule.takes_curvature else (Operand.GRADIENT,)


class State:
    """The arrays of one optimizer. All slots are 0 at first.

    Attributes:
        layout: The model.
        settings: The present settings. Their method never changes.
        operand_kinds: The operands of a step.
        backend: Computes steps.
        slots: The arenas of each slot, by dtype.
        parameters: The arenas of x, in host memory; empty in delta mode.
        limits: The largest magnitude that an operand may have when it arrives, in each dtype.
        last_learning_rates: Those of the last step that was applied; see `Rows`.

    Raises:
        OptserveError: HYPERPARAMETER_OUT_OF_RANGE.
    """

    def __init__(self, layout: Layout, settings: Settings, backend: Backend) -> None:
        self.layout = layout
        self.backend = backend
        # The settings of the last step that had some of its own, and its constants.
        self._of_step: tuple[StepSettings, Constants] | None = None
        # (constants, step, staleness) of the last step that was applied.
        self._last: tuple[Constants, int, int] | None = None
        self.last_learning_rates: tuple[float, ...] = ()
        self._bounds = StepBounds(Headroom(self._extremes, hosted=settings.hosted))
        self.set(settings)
        rule = settings.rule
        self.operand_kinds = operands_of(rule)
        self.slots: dict[np.dtype, list[Any]] = {
            dtype: [backend.zeros(layout.sizes[dtype], dtype) for _ in rule.slots] for dtype in self.layout.dtypes
        }
        self.parameters: Arenas = layout.arenas(backend.staging(layout.size_bytes)) if settings.hosted else {}
        self._parameter_steps = ParameterSteps([0] * len(layout.parameters) if rule.counts_steps else [])

    @property
    def rule(self) -> Rule:
        """The method with its present hyper-parameters."""
        return self.settings.rule

    def check(self, settings: Settings) -> list[Rule]:
        """Check new settings, and return their rules.

        Raises:
            OptserveError: HYPERPARAMETER_OUT_OF_RANGE or INVALID_FIELD.
        """
        settings.check()
        rules = settings.rules()
        # Where all tensors are empty, those that the tensors would have.
        for dtype in self.layout.dtypes or {parameter.dtype for parameter in self.layout.parameters}:
            for rule in rules:
                rule.check(dtype)
        return rules

    def set(self, settings: Settings) -> None:
        """Change the settings. If one is out of range, raises HYPERPARAMETER_OUT_OF_RANGE and changes none."""
        rules = self.check(settings)
        compile_ahead(settings, self.layout.dtypes, self.backend)
        self.settings = settings
        self.limits = {
            (operand, dtype): self._limit(operand, dtype, rules)
            for operand in operands_of(settings.rule)
            for dtype in self.layout.dtypes
        } | {(Operand.PARAMETER, dtype): float(np.finfo(dtype).max) for dtype in self.layout.dtypes}
        self._constants = constants_of(self.layout, settings, rules)
        self._of_step = None
        self._bounds.set(self._constants)

    def constants_for(self, settings: StepSettings | None) -> Constants:
        """The constants of a step with those settings.

        Raises:
            OptserveError: See `StepSettings.checked_rules`.
        """
        if settings is None:
            return self._constants
        known = self._of_step
        if known is None or known[0] != settings:
            known = self._of_step = settings, self._constants.of_step(settings)
        return known[1]

    def _limit(self, operand: Operand, dtype: np.dtype, rules: Sequence[Rule]) -> float:
        if operand is Operand.GRADIENT and self.settings.clipping is not None:
            # Clipping will reduce what is too large for the rule.
            return float(np.finfo(dtype).max)
        return float(dtype.type(min(rule.gradient_limit(dtype) for rule in rules)))

    def _extremes(self) -> dict[np.dtype, Bounds]:
        """The bounds of all elements, measured by one pass over them."""
        return {
            dtype: Bounds(
                tuple(self.backend.extremes(slot) for slot in self.slots[dtype]),
                self.backend.largest(self.parameters[dtype]) if self.parameters else 0.0,
            )
            for dtype in self.layout.dtypes
        }

    @staticmethod
    def required_bytes(layout: Layout, settings: Settings) -> int:
        """Bytes that a state of this layout and these settings occupies, with one staging buffer."""
        return (len(settings.arrays) + len(operands_of(settings.rule))) * layout.size_bytes

    def take_over(self, larger: State) -> None:
        """Become a new state that has more parameters behind these, which keep their values.

        Args:
            larger: A new state of the same method. Do not use it afterwards.
        """
        for dtype, slots in self.slots.items():
            for slot, target in zip(slots, larger.slots[dtype], strict=True):
                self.backend.copy_slot(slot, target)
        for dtype, arena in self.parameters.items():
            self.backend.copy(arena, larger.parameters[dtype][: arena.size])
        kept = self.parameter_steps
        self._parameter_steps = ParameterSteps(np.concatenate((kept, larger.parameter_steps[kept.size :])))
        self.layout, self.slots, self.parameters = larger.layout, larger.slots, larger.parameters
        self.set(larger.settings)

    def release(self) -> None:
        """Drop the arrays. The state cannot be used afterwards."""
        self.slots.clear()
        self.parameters.clear()

    @property
    def backend_name(self) -> str:
        """Name of the backend that computes steps."""
        return self.backend.name

    @property
    def memory_bytes(self) -> int:
        """Bytes that the state occupies, with one staging buffer."""
        return self.required_bytes(self.layout, self.settings)

    def measure(self, payload: Payload, gradients: Sequence[np.ndarray]) -> Clip | None:
        """How clipping changes a step's gradients, run by run; None without clipping."""
        return self.settings.clipping.measure(payload, gradients) if self.settings.clipping else None

    def prepare(
        self,
        payload: Payload,
        gradients: Arenas,
        largest: Largest,
        reply_wires: ReplyWires,
        options: StepOptions = PLAIN,
    ) -> Prepared:
        """Prepare a step: measure its clipping, and find out whether bounds cover it. Changes nothing.

        Args:
            payload: The parameters that take part.
            gradients: The arenas of the gradient.
            largest: The largest magnitudes of the operands.
            reply_wires: The wire dtypes of the step's reply.
            options: What the step asks for.

        Raises:
            OptserveError: See `StepSettings.checked_rules`.
        """
        settings, with_norm, _ = options
        constants = self._constants if settings is None else self.constants_for(settings)
        if self.settings.clipping is None and not with_norm:
            return COVERED if self._bounds.cover(constants, largest, reply_wires) else UNCOVERED
        measured = measure(self.settings, payload, payload.parts(gradients), largest, with_norm=with_norm)
        covered = self._bounds.cover(constants, measured.largest, reply_wires)
        return Prepared(measured.clip, covered, measured.norm, measured.clipped)

    def apply(
        self,
        operands: Operands,
        runs: Iterable[Run],
        step: int,
        staleness: int = 0,
        prepared: Prepared | None = None,
        settings: StepSettings | None = None,
    ) -> None:
        """Turn the gradients of the runs into updates, in place. Advance the slots, and x in hosted mode.

        Args:
            operands: The arenas of a staging buffer.
            runs: The stretches of the arenas that take part.
            step: Number of steps applied before; the schedule of the learning rate depends on it.
            staleness: The learning rate is divided by 1 + staleness; 0 to leave it as it is.
            prepared: The result of `prepare`; None if nothing is clipped.
            settings: Settings for this step only.
        """
        constants = self._constants if settings is None else self.constants_for(settings)
        self._last = constants, step, staleness
        rows, clip = constants.at(step, staleness), prepared.clip if prepared else None
        self.last_learning_rates = rows.learning_rates
        if not (prepared and prepared.covered):
            self._bounds.reset()
        stretches: dict[np.dtype, list[Stretch]] = {}
        for run_number, run in enumerate(runs):
            dtype = run.dtype
            if clip is not None:
                clip.apply(run_number, 0, operands[Operand.GRADIENT][dtype][run.start : run.stop])
            found = stretches.setdefault(dtype, [])
            for part, position, counter in constants.parts_of(run, self._parameter_steps):
                decay = constants.decay(dtype, position, step, staleness) if self.parameters else None
                found.append(Stretch(part, rows.of(dtype, position, counter), decay))
        for dtype, found in stretches.items():
            given = [arenas[dtype] for arenas in operands.values()]
            self.backend.make_steps(
                type(self.settings.rule), given, self.slots[dtype], self.parameters.get(dtype), found
            )

    @property
    def parameter_steps(self) -> np.ndarray:
        """Steps that each parameter has taken part in; empty if the rule does not use it. Do not change it."""
        return self._parameter_steps.each

    def count(self, selection: Selection) -> None:
        """Count one more step for the parameters that have taken part in it."""
        self._parameter_steps.count(selection)

    def set_parameter_steps(self, written: Written | None, step: int) -> None:
        """Replace the step counters of the parameters, if the rule uses them.

        Args:
            written: The counters in the form on disk; None if an earlier version or another method has written none.
                Then every parameter counts as having taken part in all steps.
            step: Number of steps applied.

        Raises:
            ValueError: The counters do not fit the parameters.
        """
        self._parameter_steps.replace(step if written is None else written)

    @property
    def written_parameter_steps(self) -> Written | None:
        """The step counters in the form on disk; None if the rule does not use them."""
        return self._parameter_steps.written

    def trial_step(
        self, operand_parts: Sequence[np.ndarray], dtype: np.dtype, part: Part, rows: Rows, decay: Decay
    ) -> dict[str, Any]:
        """Make a step on copies of a part of an arena that has one row of constants.

        Args:
            operand_parts: The operands in that part, clipped; the first becomes the update.
            dtype: The arena.
            part: The part of the arena.
            rows: The constants of the step.
            decay: The weight decay of the step.

        Returns:
            The new arrays of the state, and the update, by name.
        """
        where, position, counter = part
        slots = [self.backend.clone(slot[where]) for slot in self.slots[dtype]]
        parameters = self.parameters[dtype][where].copy() if self.parameters else None
        row = rows.of(dtype, position, counter)
        self.backend.make_step(type(self.rule), operand_parts, slots, row, parameters, decay)
        made = dict(zip(self.rule.slots, slots, strict=True)) | {UPDATE: operand_parts[0]}
        return made if parameters is None else made | {PARAMETER: parameters}

    def parts_of(self, run: Run) -> Sequence[Part]:
        """The parts of a run that have one row of constants each."""
        return self._constants.parts_of(run, self._parameter_steps)

    def copy_of_parameters(self) -> Arenas:
        """A copy of x as it is now."""
        copies = {dtype: np.empty_like(arena) for dtype, arena in self.parameters.items()}
        for dtype, arena in self.parameters.items():
            self.backend.copy(arena, copies[dtype])
        return copies

    def last_rule_of(self, tensor: int, step: int) -> Rule:
        """The rule of a parameter in the last step, with the learning rate of that step.

        The last step of a state that came from a file or a client is not known; then the settings give the rule.

        Args:
            tensor: Index of the parameter.
            step: Number of steps applied.
        """
        constants, *at = self._last or (self._constants, max(step - 1, 0), 0)
        # Parameters that were added since have the rules that they will have.
        return (constants if tensor < constants.parameter_count else self._constants).rule_of(tensor, *at)

    def step_counter_of(self, tensor: int) -> int:
        """The step counter of a parameter in the last step that it took part in, or else in its first; see `Rule`."""
        return max(self._parameter_steps.of(tensor), FIRST_STEP)

    def forget_last_step(self) -> None:
        """Forget the last step, because the state was replaced by another one."""
        self._last = None

    def sample(self, dtype: np.dtype, slot: int, where: slice | np.ndarray) -> np.ndarray:
        """A copy of elements of one arena of one slot, in float64."""
        if dtype not in self.slots:
            return np.empty(0)
        return self.backend.to_host(self.slots[dtype][slot][where]).astype(np.float64)

    def read(self, dtype: np.dtype, array: int, start: int, stop: int) -> np.ndarray:
        """A stretch of one arena of one of `Settings.arrays`, in host memory. Valid until the next change."""
        if array == len(self.rule.slots):
            return self.parameters[dtype][start:stop]
        return np.ascontiguousarray(self.backend.to_host(self.slots[dtype][array][start:stop]))

    def write(self, dtype: np.dtype, array: int, start: int, values: np.ndarray) -> None:
        """The reverse of `read`."""
        self._bounds.reset()
        if array == len(self.rule.slots):
            self.backend.copy(values, self.parameters[dtype][start : start + values.size])
        else:
            self.backend.fill(self.slots[dtype][array][start : start + values.size], values)

    def slot(self, tensor: int, slot: int) -> np.ndarray:
        """One slot of one parameter, in its shape."""
        parameter, start = self.layout.parameters[tensor], self.layout.starts[tensor]
        if not parameter.size:
            return np.empty(parameter.shape, parameter.dtype)
        arena = self.slots[parameter.dtype][slot]
        return self.backend.to_host(arena[start : start + parameter.size]).reshape(parameter.shape)
