"""The arrays of one optimizer: its slots and its staging buffer. Generic over rules and backends.

It knows nothing of steps as transactions; `steps.py` decides what may happen to it and when.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optserve_server.backends import Backend
from optserve_server.layout import Layout, Operand, Operands, Payload, Run
from optserve_server.rules import Rule
from optserve_server.settings import Settings

Buffer = bytes | memoryview


def operands_of(rule: Rule) -> tuple[Operand, ...]:
    """What a step of that rule brings."""
    return (Operand.GRADIENT, Operand.CURVATURE) if rule.takes_curvature else (Operand.GRADIENT,)


class State:
    """Slots, all 0 at first, and one staging buffer, which takes a gradient and is overwritten by the update.

    Memory is (slots + 1) × the bytes of the parameters, and once more where the rule takes curvature.

    Raises:
        OptserveError: HYPERPARAMETER_OUT_OF_RANGE.
    """

    def __init__(self, layout: Layout, settings: Settings, backend: Backend) -> None:
        self.layout = layout
        self._backend = backend
        self._dtypes = [dtype for dtype, size in layout.sizes.items() if size]
        self.set(settings)
        rule = settings.rule
        for dtype in self._dtypes:
            backend.kernel(type(rule), dtype)
        self.slots: dict[np.dtype, list[Any]] = {
            dtype: [backend.zeros(layout.sizes[dtype], dtype) for _ in rule.slots] for dtype in self._dtypes
        }
        self.operands = self._operands()

    @property
    def rule(self) -> Rule:
        """The method with its present hyper-parameters."""
        return self.settings.rule

    def set(self, settings: Settings) -> None:
        """Change the settings; refused as a whole where one is out of range."""
        settings.check()
        rules = settings.rules()
        for dtype in self._dtypes or list(self.layout.sizes):
            for rule in rules:
                rule.check(dtype)
        self.settings = settings
        self._limits = {dtype: dtype.type(min(rule.gradient_limit(dtype) for rule in rules)) for dtype in self._dtypes}
        self._stretches = {dtype: self._stretches_of(dtype) for dtype in self._dtypes}
        # Without a schedule the constants are always the same.
        self._constants = None if settings.schedule else self._scalars(0)

    def _stretches_of(self, dtype: np.dtype) -> list[tuple[int, int, int]]:
        """(start, stop, position among the rules) of the stretches of an arena that follow one rule."""
        position_of = {
            index: position for position, group in enumerate(self.settings.groups, 1) for index in group.parameters
        }
        stretches: list[tuple[int, int, int]] = []
        for index, parameter in enumerate(self.layout.parameters):
            if parameter.dtype != dtype or not parameter.size:
                continue
            start, position = self.layout.starts[index], position_of.get(index, 0)
            if stretches and stretches[-1][2] == position:
                start = stretches.pop()[0]
            stretches.append((start, self.layout.starts[index] + parameter.size, position))
        return stretches

    def _scalars(self, step: int) -> dict[np.dtype, list[list[np.generic]]]:
        """The constants of each rule at a step."""
        rules = [self.settings.at(rule, step) for rule in self.settings.rules()]
        return {dtype: [[dtype.type(scalar) for scalar in rule.scalars()] for rule in rules] for dtype in self._dtypes}

    @staticmethod
    def required_bytes(layout: Layout, rule: Rule) -> int:
        """Bytes that a state of this layout and rule occupies."""
        return (len(rule.slots) + len(operands_of(rule))) * layout.size_bytes

    def release(self) -> None:
        """Let go of the arrays; the state is of no further use."""
        self.slots.clear()
        self.operands = {operand: {} for operand in self.operands}

    def _operands(self) -> Operands:
        size = self.layout.size_bytes
        return {operand: self.layout.arenas(self._backend.staging(size)) for operand in operands_of(self.rule)}

    @property
    def staged(self) -> dict[np.dtype, np.ndarray]:
        """The arenas that take the gradient and are overwritten by the update."""
        return self.operands[Operand.GRADIENT]

    def use_staging(self, operands: Operands | None) -> None:
        """Move the content of the staging buffer to other arenas, or to new ones of the backend's, and use those."""
        before, self.operands = self.operands, operands or self._operands()
        for operand, arenas in self.operands.items():
            for dtype, arena in arenas.items():
                arena[...] = before[operand][dtype]

    def take_from(self, operands: Operands, runs: Sequence[Run]) -> tuple[Operand, Run, int] | None:
        """Copy what the runs take from other arenas, or leave it where it is if those are the staging buffer.

        Returns:
            (operand, run, element) of the first that is NaN, infinite or too large; None if there is none.
        """
        here = operands is self.operands
        for operand, arenas in self.operands.items():
            for run in runs:
                staged, limit = arenas[run.dtype][run.start : run.stop], self._limits[run.dtype]
                source = operands[operand][run.dtype][run.start : run.stop]
                if not (self._backend.within(staged, limit) if here else self._backend.take_all(staged, source, limit)):
                    return operand, run, int(np.flatnonzero(~(np.abs(staged) <= limit))[0])
        return None

    def give_to(self, operands: Operands, runs: Iterable[Run]) -> None:
        """Copy the runs' updates to other arenas, unless those are the staging buffer."""
        if operands is not self.operands:
            for run in runs:
                part = slice(run.start, run.stop)
                target = operands[Operand.GRADIENT][run.dtype][part]
                self._backend.copy(self.staged[run.dtype][part], target)

    @property
    def backend_name(self) -> str:
        """Name of the backend that computes it."""
        return self._backend.name

    @property
    def memory_bytes(self) -> int:
        """Bytes that it occupies."""
        return self.required_bytes(self.layout, self.rule)

    def stage(self, operand: Operand, run: Run, start: int, data: np.ndarray) -> int | None:
        """Copy wire elements into the staging buffer and check them.

        Args:
            operand: What they are.
            run: Where the elements belong.
            start: First element, within the arena.
            data: Elements in the run's wire dtype.

        Returns:
            Index within `data` of the first element that is NaN, infinite or too large to be squared; None if
            there is none.
        """
        staged = self.operands[operand][run.dtype][start : start + data.size]
        limit = self._limits[run.dtype]
        if self._backend.take(staged, data, limit):
            return None
        return int(np.flatnonzero(~(np.abs(staged) <= limit))[0])

    def give(self, run: Run, start: int, stop: int) -> np.ndarray:
        """A stretch of the staging buffer in the run's wire dtype; a view of it where that is its own."""
        return self._backend.give(self.staged[run.dtype][start:stop], run.wire)

    def clip(self, payload: Payload, gradients: Sequence[np.ndarray] | None = None) -> float | None:
        """Keep a step's gradients within the bound that is set, if there is one; see Clipping.clip.

        Args:
            payload: Of the step.
            gradients: Run by run; those that are staged by default.
        """
        if self.settings.clipping is None:
            return None
        if gradients is None:
            gradients = [self.staged[run.dtype][run.start : run.stop] for run in payload.runs]
        return self.settings.clipping.clip(payload, gradients)

    def apply(self, runs: Iterable[Run], step: int) -> None:
        """Turn the staged gradients of the runs into updates, in place, and advance the slots.

        Args:
            runs: What takes part.
            step: Number of steps applied before, by which the learning rate is scheduled.
        """
        scalars = self._constants or self._scalars(step)
        for run in runs:
            kernel = self._backend.kernel(type(self.rule), run.dtype)
            for start, stop, position in self._stretches[run.dtype]:
                part = slice(max(start, run.start), min(stop, run.stop))
                if part.start < part.stop:
                    slots = [slot[part] for slot in self.slots[run.dtype]]
                    staged, *inputs = (arenas[run.dtype][part] for arenas in self.operands.values())
                    kernel(staged, slots, scalars[run.dtype][position], *inputs)

    def rule_of(self, tensor: int) -> Rule:
        """The rule that a parameter follows."""
        groups = self.settings.groups
        position = next((turn for turn, group in enumerate(groups, 1) if tensor in group.parameters), 0)
        return self.settings.rules()[position]

    def look(self, dtype: np.dtype, slot: int, where: slice | np.ndarray) -> np.ndarray:
        """A copy of elements of one arena of one slot, in float64."""
        if dtype not in self.slots:
            return np.empty(0)
        return self._backend.to_host(self.slots[dtype][slot][where]).astype(np.float64)

    def read(self, dtype: np.dtype, slot: int, start: int, stop: int) -> np.ndarray:
        """A stretch of one arena of one slot, in host memory; to be used while nothing changes."""
        return np.ascontiguousarray(self._backend.to_host(self.slots[dtype][slot][start:stop]))

    def write(self, dtype: np.dtype, slot: int, start: int, values: np.ndarray) -> None:
        """The reverse of `read`."""
        self._backend.fill(self.slots[dtype][slot][start : start + values.size], values)

    def capture(self, dtype: np.dtype, start: int, stop: int) -> list[bytes]:
        """Copies of a stretch of one arena: of each slot, and of the staging buffer last."""
        parts = [self.read(dtype, slot, start, stop) for slot in range(len(self.slots[dtype]))]
        return [part.tobytes() for part in (*parts, self.staged[dtype][start:stop])]

    def restore(self, dtype: np.dtype, start: int, stop: int, parts: Sequence[Buffer]) -> None:
        """The reverse of `capture`."""
        for slot, part in enumerate(parts[:-1]):
            self.write(dtype, slot, start, np.frombuffer(part, dtype, stop - start))
        self.staged[dtype][start:stop] = np.frombuffer(parts[-1], dtype)

    def slot(self, tensor: int, slot: int) -> np.ndarray:
        """One slot of one parameter, in its shape."""
        parameter, start = self.layout.parameters[tensor], self.layout.starts[tensor]
        arena = self.slots[parameter.dtype][slot] if parameter.size else np.empty(0, parameter.dtype)
        return self._backend.to_host(arena[start : start + parameter.size]).reshape(parameter.shape)
