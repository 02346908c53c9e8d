"""A complete step becomes the next one in two operations: it is written down, and then applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optserve_server.domain import refusals
from optserve_server.engine import transition
from optserve_server.engine.durability import Durability
from optserve_server.engine.records import PlacementRecord
from optserve_server.engine.step_record import StepRecord, WorkerStep
from optserve_server.engine.transaction import NOT_KNOWN, PARAMETERS, Effect, Outcome, Step
from optserve_server.engine.transition import WrittenStep
from optserve_server.numerics.gradient_mean import Gradient
from optserve_server.numerics.headroom import ReplyWires
from optserve_server.numerics.layout import Operand, Payload
from optserve_server.numerics.shared_segment import Segment
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import PLAIN, StepOptions, StepPoint
from optserve_server.numerics.trial import run_trial

if TYPE_CHECKING:
    from optserve_server.engine.steps import Steps


# Python looks a member up in its Enum more slowly than a name.
_PARAMETER = Operand.PARAMETER


class Committer:
    """Makes complete steps of one optimizer.

    Args:
        steps: Count what is made here.
        name: The optimizer's, for records.
        state: Its arrays.
        durability: Writes each step down before it is applied.
    """

    def __init__(self, steps: Steps, name: str, state: State, durability: Durability) -> None:
        self._steps = steps
        self._name = name
        self._state = state
        self._durability = durability
        # Most steps have the same learning rates as the one before, and nothing else to tell.
        self._rates_only = NOT_KNOWN

    def commit(self, step: Step) -> Outcome:
        """Apply the step that holds the step slot of the optimizer's client.

        Raises:
            OptserveError: See `Step.commit`.
        """
        steps = self._steps
        step_slot = steps.main
        with step_slot.lock:
            staging = step_slot.check_holds(step)
            if _PARAMETER in step.coverage:
                return self._commit_placement(step)
            step.reply_source = self._state.parameters if step.replies is PARAMETERS else staging.updates
            if step.replay and step_slot.retained:
                step_slot.check_replay(step)
                step_slot.write_shared_reply(step, steps.step)
                return step_slot.retained.replayed()
            if step.segment is not None:
                step_slot.take_shared_gradients(step, step.segment)
            step.check_complete()
            written = self.prepare(
                Gradient(staging, step.largest), step.payload, step.reply_wires, options=step.options,
                request_id=step.request_id,
            )  # fmt: skip
            effect = self.apply(written, step.segment)
            step.committed = True
            if step_slot.retained is not None:
                step_slot.retained.effect = effect
            if step.segment:
                step_slot.write_shared_reply(step, steps.step)
            step.last_progress_at = step_slot.monotonic()
            return Outcome(step.request_id, steps.step, False, effect)

    def _commit_placement(self, step: Step) -> Outcome:
        steps = self._steps
        if not step.replay:
            step.check_complete()
            arrived = step.payload.parts(steps.main.staging.updates)
            record = PlacementRecord(self._name, step.request_id, arrived)
            lsn = self._durability.write(record)
            transition.apply_placement(self._state, step.payload.runs, record)
            transition.note_placement(steps, record, lsn)
            step.committed = True
        return Outcome(step.request_id, steps.step, replayed=step.replay)

    def prepare(
        self,
        gradient: Gradient,
        payload: Payload,
        reply_wires: ReplyWires,
        workers: Sequence[WorkerStep] = (),
        *,
        options: StepOptions = PLAIN,
        staleness: int = 0,
        request_id: str = "",
    ) -> WrittenStep:
        """Check the complete step that a buffer holds, and write it down, under the lock; nothing changes.

        Args:
            gradient: The buffer, and the largest magnitudes of what it holds.
            payload: What takes part.
            reply_wires: The wire dtypes of the reply.
            workers: See StepRecord, where several share the optimizer.
            options: What the step asks for.
            staleness: By which the learning rate is scaled; 0 where it is not.
            request_id: Of the step, where they do not.

        Raises:
            OptserveError: ETAG_MISMATCH, GRADIENT_OVERFLOW, REPLY_OVERFLOW or NOT_DURABLE; or see
                `StepSettings.checked_rules`.
        """
        if options.etag:
            refusals.check_etag_of_step(self._name, options.etag, self._steps.etag)
        staging, step, settings = gradient.staging, self._steps.step, options.settings
        prepared = self._state.prepare(payload, staging.updates, gradient.largest, reply_wires, options)
        if not prepared.covered:
            point = StepPoint(step, staleness, settings)
            run_trial(self._state, staging.operands, payload, prepared, reply_wires, point)
        lsn, operands = self._steps.lsn, []
        is_read = self._durability.reads_staging
        if is_read:
            operands = [part for arenas in staging.operands.values() for part in payload.parts(arenas)]
        record = StepRecord(
            self._name, step, request_id, payload.selection, operands, workers, staleness, settings
        )  # fmt: skip
        if is_read:
            lsn = self._durability.write(record)
        return WrittenStep(record, lsn, payload, staging, prepared)

    def apply(self, written: WrittenStep, segment: Segment | None = None) -> Effect:
        """Apply a step that was prepared, with no other change in between, under the lock.

        Args:
            written: The step.
            segment: In which the gradients are, if a client shares them.

        Raises:
            OptserveError: STATE_LOST.
        """
        record, lsn, payload, staging, prepared = written
        if segment and staging.in_place:
            segment.begin_reply(record.step + 1)
        try:
            transition.apply_step(self._state, staging.operands, payload.runs, record, prepared)
        except Exception as error:
            raise self._steps.mark_lost(f"in step {record.step}") from error
        transition.note_step(self._steps, record, payload.selection, lsn)
        rates = self._state.last_learning_rates
        if prepared.norm is not None or prepared.clipped is not None:
            return Effect(prepared.norm, rates, prepared.clipped)
        if rates is not self._rates_only.learning_rates:
            self._rates_only = Effect(learning_rates=rates)
        return self._rates_only
