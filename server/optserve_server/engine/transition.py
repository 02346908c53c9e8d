"""Makes the changes that records describe. The running server and recovery both call these functions.

A change has up to two functions. `apply_…` changes the arrays in the given stretches. The running server gives all
stretches; recovery gives those that do not contain the change yet. `note_…` changes everything else, once. Call both
with the optimizer's lock held, after the record was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from optserve_server.engine.records import (
    AdditionRecord,
    CreationRecord,
    PlacementRecord,
    ReplacementRecord,
    UpdateRecord,
)
from optserve_server.engine.step_record import StepRecord
from optserve_server.engine.transaction import Retained
from optserve_server.numerics.backends import Backend
from optserve_server.numerics.layout import Layout, Operands, Payload, Payloads, Run, Selection
from optserve_server.numerics.preparation import Prepared
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State

if TYPE_CHECKING:
    from optserve_server.engine.steps import Steps

Stretches = Callable[[np.dtype, int, int], Iterable[tuple[int, int]]]
"""Divides a part of an arena, given by dtype, first element and element after the last.

The result is the stretches in which to make the change: (first element, element after the last) of each.
"""


class Replacement(NamedTuple):
    """A restore, an import or an addition of parameters that was made.

    Attributes:
        request_id: Its request id.
        target: What was restored, imported or added, in words; empty if an earlier version wrote the record.
    """

    request_id: str
    target: str


class Room(NamedTuple):
    """Arrays for an optimizer that gets more parameters. They are made before the record is written.

    Attributes:
        state: A new state with all parameters.
        staging: Its staging buffer.
    """

    state: State
    staging: Staging

    @classmethod
    def of(cls, layout: Layout, settings: Settings, backend: Backend) -> Room:
        """The arrays for parameters and settings; raises HYPERPARAMETER_OUT_OF_RANGE, or MemoryError."""
        state = State(layout, settings, backend)
        return cls(state, Staging(state))


class WrittenStep(NamedTuple):
    """A complete step that was checked and whose record was written, but that is not applied yet.

    Attributes:
        record: Its record.
        lsn: LSN of the record.
        payload: The parameters of the step.
        staging: The buffer that contains the operands. `apply_step` overwrites them by the updates.
        prepared: How the gradient is clipped, and whether bounds prove that the step leaves everything finite.
    """

    record: StepRecord
    lsn: int
    payload: Payload
    staging: Staging
    prepared: Prepared


def everywhere(_dtype: np.dtype, start: int, stop: int) -> Iterable[tuple[int, int]]:
    """The stretches for a change of the running server: the whole part."""
    return ((start, stop),)


def note_creation(steps: Steps, record: CreationRecord, lsn: int) -> None:
    """Set everything except the arrays of a new optimizer, which are zeros."""
    steps.lsn, steps.lineage = lsn, record.lineage
    steps.etag, steps.update_time = record.etag, record.create_time


def note_update(steps: Steps, record: UpdateRecord, lsn: int) -> None:
    """Change an optimizer's settings."""
    steps._state.set(record.settings)
    steps.lsn, steps.etag, steps.update_time = lsn, record.etag, record.time


def apply_step(state: State, operands: Operands, runs: Iterable[Run], record: StepRecord, prepared: Prepared) -> None:
    """Overwrite the operands of a step by its updates, and change the arrays of the state.

    Args:
        state: The state to change.
        operands: The arenas that contain the operands.
        runs: The stretches to change.
        record: The step.
        prepared: How the gradients of these stretches are clipped.
    """
    state.apply(operands, runs, record.step, record.staleness, prepared, record.settings)


def note_step(steps: Steps, record: StepRecord, selection: Selection, lsn: int) -> None:
    """Count a step, for the optimizer and for each parameter that took part, and keep what its replay needs.

    Args:
        steps: The steps of the optimizer.
        record: The record of the step.
        selection: The parameters that took part.
        lsn: LSN of the record.
    """
    steps.lsn, steps.step = lsn, record.step + 1
    steps._state.count(selection)
    if record.workers:
        for name, request_id, clock in record.workers:
            # Not intact until the reply is in the worker's buffer.
            steps.workers.registry.made_step(name, Retained(request_id, steps.step, selection, intact=False), clock)
        # The step has overwritten the reply in the step slot of the single client.
        steps.main.retained = None
    else:
        steps.main.retained = Retained(record.request_id, steps.step, selection)


def apply_placement(
    state: State, runs: Iterable[Run], record: PlacementRecord, stretches: Stretches = everywhere
) -> None:
    """Write the uploaded x, run by run."""
    parameter = len(state.rule.slots)
    for run, values in zip(runs, record.parameters, strict=True):
        for start, stop in stretches(run.dtype, run.start, run.stop):
            state.write(run.dtype, parameter, start, values[start - run.start : stop - run.start])


def note_placement(steps: Steps, record: PlacementRecord, lsn: int) -> None:
    """Keep the request id of an upload of x."""
    steps.lsn, steps.placed_by = lsn, record.request_id


def apply_addition(steps: Steps, record: AdditionRecord, room: Room) -> None:
    """Move an optimizer's arrays into larger ones, and write x of the new parameters behind that of the others."""
    state = steps._state
    begins = dict(state.layout.sizes)
    state.take_over(room.state)
    steps.main.staging.take_over(room.staging)
    for dtype, _, values in record.parameters:
        state.write(dtype, len(state.rule.slots), begins[dtype], values)


def note_addition(steps: Steps, record: AdditionRecord, lsn: int) -> None:
    """Set everything except the arrays of an optimizer that has got parameters.

    A last step of all parameters was of those that there were.
    """
    layout = steps._state.layout
    before = Selection(layout.all_tensors[: len(layout.parameters) - len(record.added.parameters)])
    steps.payloads = Payloads(layout)
    steps.lsn = steps.layout_lsn = lsn
    for step_slot in (steps.main, *(worker.step_slot for worker in steps.workers.registry)):
        if step_slot.retained is not None and step_slot.retained.selection.is_all:
            step_slot.retained.selection = before
    steps.etag, steps.update_time = record.etag, record.time
    steps.replacements.append(Replacement(record.request_id, record.target))


def apply_replacement(state: State, record: ReplacementRecord, stretches: Stretches = everywhere) -> None:
    """Write all arrays of the new state."""
    for dtype, array, values in record.arrays:
        for start, stop in stretches(dtype, 0, values.size):
            state.write(dtype, array, start, values[start:stop])


def note_replacement(steps: Steps, record: ReplacementRecord, lsn: int) -> None:
    """Set everything of the new state except its arrays, and forget the replies of the old one."""
    steps._state.set(record.settings)
    steps._state.forget_last_step()
    steps._state.set_parameter_steps(record.parameter_steps, record.step)
    steps.lsn, steps.step, steps.lineage = lsn, record.step, record.lineage
    steps.main.retained, steps.placed_by = None, record.placed_by
    steps.workers.forget_replies()
    steps.etag, steps.update_time = record.etag, record.time
    if record.request_id:
        steps.replacements.append(Replacement(record.request_id, record.target))
