"""The transaction: begin, stage, commit, reply, replay. Knows nothing of protobuf or gRPC.

One `Steps` guards one optimizer, and decides when a step is applied; its `StepSlot` decides who may make one. Errors
name their field by itself (`tensors`, `offset`); the edges add the path.

    begin ──> staging ──commit──> replying ──close──> (the reply stays, for replays)
                 └──close, error──> nothing changed
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain import refusals
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine import transition
from optserve_server.engine.change_queue import ChangeQueue
from optserve_server.engine.committer import Committer
from optserve_server.engine.durability import Durability
from optserve_server.engine.records import DeletionRecord, UpdateRecord
from optserve_server.engine.step_slot import ClientSlot, StepSlot
from optserve_server.engine.transaction import NOTHING, UPDATES, LastStep, Step, StepRequest, check_request_id
from optserve_server.engine.transition import Replacement
from optserve_server.engine.workers.buffer_budget import BufferBudget
from optserve_server.engine.workers.coordinator import Workers
from optserve_server.numerics.compiling import compile_for_step
from optserve_server.numerics.layout import ALL, Operand, Payload, Payloads, Selection
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.shared_segment import Segment
from optserve_server.numerics.state import State

logger = logging.getLogger(__name__)

MAX_REPLACEMENT_REQUESTS = 32
"""Restores, imports and additions of one optimizer whose request ids are remembered, for retries."""


class Steps:
    """The steps of one optimizer, one after the other.

    Args:
        name: The optimizer's, for messages and records.
        state: Its arrays.
        durability: Told of every change before it is made.
        idle_step_s: After so many seconds without a move, a step is discarded.
        buffer_budget: For the buffers of workers.
        clock: The time.

    Attributes:
        main: Where its client makes steps, if it has one.
        change_queue: For changes that come between two of its steps.
        workers: Those who share it otherwise.
        step: Steps that were applied.
        lsn: Number that the last change was given.
        layout_lsn: Number of the change that has added the last parameters; 0 if none were added.
        lineage: Says which state this is; changes when it is replaced.
        placed_by: Request id that put the hosted parameters in place; None while nobody has.
        etag: Changes with settings and state.
        update_time: When they were changed last.
        replacements: The last restores, imports and additions.
        committer: Makes complete steps.
        payloads: Of its steps.
    """

    def __init__(
        self,
        name: str,
        state: State,
        durability: Durability,
        idle_step_s: float = 60.0,
        buffer_budget: BufferBudget | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._name = name
        self._state = state
        self._durability = durability
        # As a condition, workers wait for one another on it.
        self._lock = clock.rlock()
        self.lock = clock.condition(self._lock)
        self._monotonic = clock.monotonic
        self._fatal: OptserveError | None = None
        self.committer = Committer(self, name, state, durability)
        self.payloads = Payloads(state.layout)
        self.main = ClientSlot(name, state, self._lock, self.committer.commit, idle_step_s, clock)
        self.change_queue = ChangeQueue(self.lock, self.main)
        budget = buffer_budget or BufferBudget(1 << 62, 1 << 62, clock=clock)
        self.workers = Workers(name, state, self, budget, idle_step_s, clock)
        self.placed_by: str | None = None
        self.step = 0
        self.lsn = self.layout_lsn = 0
        self.lineage = ""
        self.etag, self.update_time = "", datetime.fromtimestamp(0, UTC)
        self.replacements: deque[Replacement] = deque(maxlen=MAX_REPLACEMENT_REQUESTS)

    def last(self, worker: str = "", stream: int = 0, life: int = 0) -> LastStep:
        """The last step of the client, or of a worker; waits for an operation of a step under way.

        With the number of a stream that a worker's life has just opened, its earlier streams and lives make no more
        steps.

        Raises:
            OptserveError: INVALID_FIELD, WORKER_UNKNOWN or WORKER_REPLACED.
        """
        with self._lock:
            self._check_worker(worker)
            step_slot = self.workers.attach(worker, stream, life).step_slot if worker else self.main
            retained = step_slot.retained
            selection = retained.selection.normalized(self._state.layout) if retained else ALL
            return LastStep(self.step, step_slot.last_request_id, selection, self.lineage)

    def _check_worker(self, worker: str) -> None:
        """Raise INVALID_FIELD unless a worker is named where there are several, and only there."""
        if bool(worker) != (self._state.settings.consistency is not None):
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{self._name} has no workers, so name none."
                if worker
                else f"Several workers share {self._name}; say which one this is.",
                field="worker",
            )

    def begin(self, request: StepRequest) -> Step:
        """Start a step and hold the staging buffer for it.

        Raises:
            OptserveError: STEP_IN_PROGRESS, STATE_REPLACED, WRONG_STEP, REPLY_GONE, UNKNOWN_PARAMETER,
                DUPLICATE_PARAMETER, INVALID_FIELD, NOT_HOSTED, PARAMETERS_MISSING, WORKER_UNKNOWN, WORKER_REPLACED,
                GRADIENT_LATE, STAGING_FULL, STATE_LOST, or OPTIMIZER_NOT_FOUND when it was deleted meanwhile.
        """
        check_request_id(request.request_id)
        worker, own = request.worker, request.options.settings
        if own is not None:
            # Without the lock, because other calls would wait for it too.
            compile_for_step(self._state.settings, own, self._state.layout.dtypes, self._state.backend)
        if worker:
            with self._lock:
                self._check_worker(worker)
                known = self.workers.act(worker, request.life)
            return self.workers.steps.begin(
                known, request.stream, request.life, lambda step_slot: self._make(step_slot, request)
            )
        with self._lock:
            if self.change_queue.waiting:
                self.change_queue.wait_to_begin()
            if self._state.settings.consistency is not None:
                self._check_worker(worker)
            step = self.main.holder = self._make(self.main, request)
            return step

    def _make(self, step_slot: StepSlot, request: StepRequest) -> Step:
        """A step that may hold a step slot; a holder with the same request id loses it. Nothing can fail any more."""
        if self._fatal is not None:
            raise self._fatal.copy()
        if self._state.settings.hosted:
            self.check_placed()
        elif request.reply is not UPDATES:
            # Whoever does not hear the update cannot apply it.
            raise refusals.not_hosted(self._name, "reply")
        if request.lineage != self.lineage:
            self.check_lineage(request.lineage)
        worker, parameters_step = request.worker, request.parameters_step
        replayed = step_slot.find_replay(request.request_id, request.reply)
        if replayed is None:
            if request.expected_step is not None and request.expected_step != self.step:
                raise refusals.wrong_step(self._name, self.step, request.expected_step)
            if request.last_request_id is not None and request.last_request_id != step_slot.last_request_id:
                raise refusals.wrong_last_request(self._name, self.step, step_slot.last_request_id)
            if request.options.etag:
                refusals.check_etag_of_step(self._name, request.options.etag, self.etag)
            if request.options.settings is not None:
                # Checked now, before gradients arrive, and once more at the commit: an update may come between.
                self._state.constants_for(request.options.settings)
        at_step = self._parameters_step(worker, parameters_step) if worker or parameters_step is not None else self.step
        selection = replayed.selection if replayed else request.selection
        if request.parameter_count and request.parameter_count != len(self._state.layout.parameters):
            selection = self._known_part(selection, request.parameter_count, is_replay=replayed is not None)
        payload = self.payloads.payload_for(selection, request.wire)
        if request.segment is None:
            step_slot.leave_segment()
        step = Step(
            step_slot, request, payload, self._state.operand_kinds, replay=replayed is not None,
            parameters_step=at_step, lineage=self.lineage,
        )  # fmt: skip
        if step_slot.holder is not None:
            step_slot.inherit_progress(step, step_slot.holder)
        return step

    def _known_part(self, selection: Selection, count: int, *, is_replay: bool) -> Selection:
        """The selection of a client that knows the first `count` parameters, where there are not so many, or more."""
        if count > len(self._state.layout.parameters):
            raise refusals.state_replaced(self._name, self.lineage, self.step)
        part = selection.among_first(count)
        if is_replay and not part.listed:
            raise refusals.only_unknown_parameters(self._name, self.step, count)
        if not is_replay and len(part.listed) < len(selection.listed):
            raise refusals.unknown_on_stream(max(selection.listed), count)
        return part

    def _parameters_step(self, worker: str, given: int | None) -> int:
        if given is None:
            return self.workers.registry.get(worker).at_step if worker else self.step
        if not worker:
            raise refusals.no_other_step(self._name)
        if given > self.step:
            raise refusals.no_such_step(self._name, self.step, given)
        return given

    def begin_placement(self, request_id: str, wire: np.dtype | None = None) -> Step:
        """Start the upload of the hosted parameters: a step that steps nothing, and whose operand is x.

        Args:
            request_id: Identifies the upload for retries.
            wire: Dtype of the payload; None for each parameter's own.

        Raises:
            OptserveError: NOT_HOSTED, PARAMETERS_IN_PLACE, STEP_IN_PROGRESS, STATE_LOST or OPTIMIZER_NOT_FOUND.
        """
        check_request_id(request_id)
        with self._lock:
            self.check_usable()
            if not self._state.settings.hosted:
                raise refusals.not_hosted(self._name, "name")
            placed = self.placed_by is not None
            if placed and self.placed_by != request_id:
                raise refusals.parameters_in_place(self._name)
            if self.main.holder and self.main.holder.request_id != request_id:
                self.main.evict_if_idle()
            self.main.staging.leave_segment()
            payload, operands = self.payloads.payload_for(ALL, wire), (Operand.PARAMETER,)
            step = Step(self.main, StepRequest(request_id, reply=NOTHING), payload, operands, replay=placed)
            if self.main.holder is not None:
                self.main.inherit_progress(step, self.main.holder)
            self.main.holder = step
            return step

    def check_placed(self) -> None:
        """Raise NOT_HOSTED or PARAMETERS_MISSING unless the server holds the parameters."""
        if not self._state.settings.hosted:
            raise refusals.not_hosted(self._name, "name")
        if self.placed_by is None:
            raise refusals.parameters_missing(self._name)

    def payload(self, selection: Selection, wire: np.dtype | None) -> Payload:
        """The payload of some of the parameters; raises UNKNOWN_PARAMETER or DUPLICATE_PARAMETER."""
        with self._lock:
            return self.payloads.payload_for(selection, wire)

    def share(self) -> Segment | None:
        """Share memory with a client on this host; None if another client has that, or there is no room for it.

        Each worker may have some, beside its buffer.

        Where nothing else reads the staging buffer, it moves into the segment and gradients are computed in place;
        otherwise they are copied, so that what is written down is what was computed with.
        """
        with self._lock:
            self.check_usable()
            if self._state.settings.consistency is not None:
                return self.workers.share()
            return self.main.share(may_be_in_place=not self._durability.reads_staging)

    def unshare(self, segment: Segment) -> None:
        """The client has gone; the segment ends when its memory of it does."""
        with self._lock:
            self.workers.unshare(segment)
            self.main.unshare(segment)

    def update(self, record: UpdateRecord) -> None:
        """Have other settings from the next commit on.

        Raises:
            OptserveError: HYPERPARAMETER_OUT_OF_RANGE, STEP_IN_PROGRESS, NOT_DURABLE, that workers are alive whose
                consistency would change, STATE_LOST, or OPTIMIZER_NOT_FOUND when it was deleted meanwhile.
        """
        with self._lock:
            self.check_usable()
            self._make_ready_for(record.settings)
            transition.note_update(self, record, self._durability.write(record))

    def _make_ready_for(self, settings: Settings) -> None:
        """Check settings that are about to be set, and then let go what would be in their way."""
        self._state.check(settings)
        if settings.consistency != self._state.settings.consistency:
            self.workers.check_none_alive("change its consistency", "optimizer.consistency")
            # Workers' means go into this buffer, and would be applied once more as the gradients of a step there.
            self.main.evict_if_idle()
        if settings.consistency is not None:
            self.main.staging.leave_segment()

    def delete(self, reason: OptserveError) -> None:
        """Delete the optimizer: refuse everything from now on with `reason`.

        Raises:
            OptserveError: STEP_IN_PROGRESS, or `reason` where that was done before.
        """
        with self._lock:
            if self._fatal is not None and self._fatal.reason is reason.reason:
                raise self._fatal.copy()
            self.main.evict_if_idle()
            self.workers.evict_if_idle()
            self._durability.write(DeletionRecord(self._name))
            self._fatal = reason
            self.workers.release()
            # Open streams may keep this object for long, but not its arrays.
            self.main.staging.release()
            self._state.release()

    def discard_idle(self) -> None:
        """Discard the step under way if it has not moved for long, though nobody wants its place."""
        self.main.discard_idle()
        self.workers.discard_idle()

    def check_lineage(self, lineage: str) -> None:
        """Raise STATE_REPLACED if that is not the present one; empty to leave it unchecked."""
        if lineage and lineage != self.lineage:
            raise refusals.state_replaced(self._name, self.lineage, self.step)

    def check_usable(self) -> None:
        """Raise what every step is refused with: OPTIMIZER_NOT_FOUND once it is deleted, STATE_LOST."""
        if self._fatal:
            raise self._fatal.copy()

    @contextmanager
    def locked_state(self) -> Iterator[State]:
        """Hold the lock for the length of a with-block, so that nothing changes, and give the state."""
        with self._lock:
            yield self._state

    def mark_lost(self, what: str) -> OptserveError:
        """The error for slots that could not be changed, after which nothing is to be trusted any more."""
        # They may be half changed, and there is no second copy of them in memory.
        logger.exception("%s was lost %s", self._name, what)
        self._fatal = OptserveError(
            Reason.STATE_LOST,
            f"The device failed {what}; the state of {self._name} is not to be trusted. Restore a checkpoint.",
            optimizer=self._name,
        )
        return self._fatal.copy()
