"""What each record changes, written once: called when the change is made, and by recovery when it is made once more.

A change has two halves. `apply_…` changes the arrays, in the stretches that are given: all of them when the change is
made, and in recovery those that do not contain it yet. `note_…` changes everything else, once. Both are called with the
optimizer's lock held, after the record was written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from optserve_server.engine.records import (
    CreationRecord,
    PlacementRecord,
    ReplacementRecord,
    StepRecord,
    UpdateRecord,
)
from optserve_server.engine.transaction import Retained
from optserve_server.numerics.layout import Operands, Payload, Run, Selection
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import Prepared, State

if TYPE_CHECKING:
    from optserve_server.engine.steps import Steps

Stretches = Callable[[np.dtype, int, int], Iterable[tuple[int, int]]]
"""Gives the stretches, of the part of an arena from one element to another, that a change is to be made in."""


class Replacement(NamedTuple):
    """A restore or an import that was made.

    Attributes:
        target: What it has put in place, in words; empty where an earlier version has not written it down.
    """

    request_id: str
    target: str


class WrittenStep(NamedTuple):
    """A step that is complete, checked and written down. Nothing has changed yet, and it may be applied.

    Attributes:
        lsn: Its number.
        payload: What takes part.
        staging: The buffer that holds the operands, and will hold the updates.
        prepared: How it is clipped, and whether bounds cover it.
    """

    record: StepRecord
    lsn: int
    payload: Payload
    staging: Staging
    prepared: Prepared


def everywhere(_dtype: np.dtype, start: int, stop: int) -> Iterable[tuple[int, int]]:
    """All of a part."""
    return ((start, stop),)


def note_creation(steps: Steps, record: CreationRecord, lsn: int) -> None:
    """An optimizer exists; its arrays are new."""
    steps.lsn, steps.lineage = lsn, record.lineage
    steps.etag, steps.update_time = record.etag, record.create_time


def note_update(steps: Steps, record: UpdateRecord, lsn: int) -> None:
    """An optimizer has other settings."""
    steps._state.set(record.settings)
    steps.lsn, steps.etag, steps.update_time = lsn, record.etag, record.time


def apply_step(state: State, operands: Operands, runs: Iterable[Run], record: StepRecord, prepared: Prepared) -> None:
    """Turn the operands of a step into updates, in place, and advance the arrays.

    Args:
        state: Takes the step.
        operands: The arenas that hold the operands.
        runs: The stretches.
        record: The step.
        prepared: How the gradients of these stretches are clipped.
    """
    state.apply(operands, runs, record.step, record.staleness, prepared)


def note_step(steps: Steps, record: StepRecord, selection: Selection, lsn: int) -> None:
    """Count a step, for each parameter that took part in it too, and remember who made it.

    Args:
        steps: Those of the optimizer.
        record: The step.
        selection: What took part.
        lsn: Its number.
    """
    steps.lsn, steps.step = lsn, record.step + 1
    steps._state.count(selection)
    if record.workers:
        for name, request_id, clock in record.workers:
            # Whoever has its reply says so afterwards.
            steps.workers.registry.made_step(name, Retained(request_id, steps.step, selection, intact=False), clock)
        # The reply that lies there is no longer that of the last step, and may be overwritten.
        steps.main.retained = None
    else:
        steps.main.retained = Retained(record.request_id, steps.step, selection)


def apply_placement(
    state: State, runs: Iterable[Run], record: PlacementRecord, stretches: Stretches = everywhere
) -> None:
    """Put x in place, run by run."""
    parameter = len(state.rule.slots)
    for run, values in zip(runs, record.parameters, strict=True):
        for start, stop in stretches(run.dtype, run.start, run.stop):
            state.write(run.dtype, parameter, start, values[start - run.start : stop - run.start])


def note_placement(steps: Steps, record: PlacementRecord, lsn: int) -> None:
    """Remember who put x in place."""
    steps.lsn, steps.placed_by = lsn, record.request_id


def apply_replacement(state: State, record: ReplacementRecord, stretches: Stretches = everywhere) -> None:
    """Put all arrays of another state in place."""
    for dtype, array, values in record.arrays:
        for start, stop in stretches(dtype, 0, values.size):
            state.write(dtype, array, start, values[start:stop])


def note_replacement(steps: Steps, record: ReplacementRecord, lsn: int) -> None:
    """The state is another one: no step that was made is a step of it."""
    steps._state.set(record.settings)
    steps._state.forget_last_step()
    steps._state.set_parameter_steps(record.parameter_steps, record.step)
    steps.lsn, steps.step, steps.lineage = lsn, record.step, record.lineage
    steps.main.retained, steps.placed_by = None, record.placed_by
    steps.workers.forget_replies()
    steps.etag, steps.update_time = record.etag, record.time
    if record.request_id:
        steps.replacements.append(Replacement(record.request_id, record.target))
