"""Changes of a whole optimizer, under the lock of its steps: another state, or more parameters."""

from __future__ import annotations

from optserve_server.domain.errors import Reason
from optserve_server.engine import transition
from optserve_server.engine.records import AdditionRecord, ReplacementRecord
from optserve_server.engine.steps import Steps
from optserve_server.engine.transition import Room


def replace(steps: Steps, record: ReplacementRecord) -> None:
    """Put another state in the place of the present one. That also mends a state that a device has lost.

    Raises:
        OptserveError: STEP_IN_PROGRESS, NOT_DURABLE, HYPERPARAMETER_OUT_OF_RANGE, that workers are alive whose
            consistency would change, or OPTIMIZER_NOT_FOUND when it was deleted meanwhile.
    """
    with steps.lock:
        if steps._fatal and steps._fatal.reason is not Reason.STATE_LOST:
            raise steps._fatal.copy()
        steps.main.evict_if_idle()
        steps._make_ready_for(record.settings)
        lsn = steps._durability.write(record)
        steps._fatal = None
        try:
            transition.apply_replacement(steps._state, record)
        except Exception as error:
            raise steps.mark_lost("while the state was replaced") from error
        transition.note_replacement(steps, record, lsn)


def check_no_workers(steps: Steps) -> None:
    """Raise WORKERS_ATTACHED if workers are alive, whose streams and buffers are of the present parameters."""
    steps.workers.check_none_alive("add parameters", "name")


def add_parameters(steps: Steps, record: AdditionRecord, room: Room) -> None:
    """Let an optimizer have more parameters.

    Args:
        steps: The steps of the optimizer.
        record: The addition.
        room: Arrays for all parameters.

    Raises:
        OptserveError: STEP_IN_PROGRESS, WORKERS_ATTACHED, NOT_DURABLE, STATE_LOST, PARAMETERS_MISSING, or
            OPTIMIZER_NOT_FOUND when it was deleted meanwhile.
    """
    with steps.lock:
        steps.check_usable()
        if record.settings.hosted:
            steps.check_placed()
        check_no_workers(steps)
        steps.main.evict_if_idle()
        steps.workers.take_buffers_back()
        # A client can write into its segment at any time; what it has overwritten is no reply any more.
        steps.main.check_overwritten()
        lsn = steps._durability.write(record)
        try:
            transition.apply_addition(steps, record, room)
        except Exception as error:
            raise steps.mark_lost("while parameters were added") from error
        transition.note_addition(steps, record, lsn)
