"""The changes that records describe, written once. The live server calls these functions, and so does recovery.

A change has two functions. `apply_…` changes the arrays, in given stretches: the live server gives all, recovery those
that do not contain the change yet. `note_…` changes everything else, once. Call both with the optimizer's lock held,
after the record was written.
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
"""(dtype, start, stop) -> the stretches of that part of an arena in which to make the change, in elements."""


class Replacement(NamedTuple):
    """A restore or an import that was made.

    Attributes:
        target: What was restored or imported, in words; empty if an earlier version has not written it down.
    """

    request_id: str
    target: str


class WrittenStep(NamedTuple):
    """A complete step that was checked and written down, but not applied yet.

    Attributes:
        lsn: Number of the record.
        payload: The parameters of the step.
        staging: The buffer that holds the operands, and will hold the updates.
        prepared: How it is clipped, and whether bounds cover it.
    """

    record: StepRecord
    lsn: int
    payload: Payload
    staging: Staging
    prepared: Prepared


def everywhere(_dtype: np.dtype, start: int, stop: int) -> Iterable[tuple[int, int]]:
    """Stretches for a live change: the whole part."""
    return ((start, stop),)


def note_creation(steps: Steps, record: CreationRecord, lsn: int) -> None:
    """Set what the creation of an optimizer sets, beside the arrays."""
    steps.lsn, steps.lineage = lsn, record.lineage
    steps.etag, steps.update_time = record.etag, record.create_time


def note_update(steps: Steps, record: UpdateRecord, lsn: int) -> None:
    """Change an optimizer's settings."""
    steps._state.set(record.settings)
    steps.lsn, steps.etag, steps.update_time = lsn, record.etag, record.time


def apply_step(state: State, operands: Operands, runs: Iterable[Run], record: StepRecord, prepared: Prepared) -> None:
    """Turn the operands of a step into updates, in place, and advance the arrays.

    Args:
        state: The state to change.
        operands: The arenas that hold the operands.
        runs: The stretches to change.
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
            # Not intact until the worker's buffer has the reply.
            steps.workers.registry.made_step(name, Retained(request_id, steps.step, selection, intact=False), clock)
        # The client's slot no longer has the reply of the last step.
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
    """Remember the request that has uploaded x."""
    steps.lsn, steps.placed_by = lsn, record.request_id


def apply_replacement(state: State, record: ReplacementRecord, stretches: Stretches = everywhere) -> None:
    """Write all arrays of another state."""
    for dtype, array, values in record.arrays:
        for start, stop in stretches(dtype, 0, values.size):
            state.write(dtype, array, start, values[start:stop])


def note_replacement(steps: Steps, record: ReplacementRecord, lsn: int) -> None:
    """Set what belongs to another state beside its arrays; forget the steps of the old one."""
    steps._state.set(record.settings)
    steps._state.forget_last_step()
    steps._state.set_parameter_steps(record.parameter_steps, record.step)
    steps.lsn, steps.step, steps.lineage = lsn, record.step, record.lineage
    steps.main.retained, steps.placed_by = None, record.placed_by
    steps.workers.forget_replies()
    steps.etag, steps.update_time = record.etag, record.time
    if record.request_id:
        steps.replacements.append(Replacement(record.request_id, record.target))
