"""The workers of one optimizer: how they enter, report, share memory and leave. `worker_steps.py` has their steps."""

from __future__ import annotations

import logging

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain import refusals
from optserve_server.engine.workers.buffer_budget import BufferBudget
from optserve_server.engine.workers.owner import Owner
from optserve_server.engine.workers.registry import ReportAnswer, Worker, WorkerRegistry
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.engine.workers.worker_steps import WorkerSteps
from optserve_server.numerics.shared_segment import Segment
from optserve_server.numerics.state import State

logger = logging.getLogger(__name__)


class Workers:
    """The workers of one optimizer.

    Args:
        name: The optimizer's, for messages.
        state: Its state.
        owner: Its steps.
        buffer_budget: Where the buffers come from.
        idle_step_s: See StepSlot.
        clock: The time.

    Attributes:
        registry: Their names, lives and leases.
        steps: Their steps.
    """

    def __init__(
        self,
        name: str,
        state: State,
        owner: Owner,
        buffer_budget: BufferBudget,
        idle_step_s: float,
        clock: Clock = SYSTEM,
    ) -> None:
        self._clock = clock
        self._name = name
        self._state = state
        self._owner = owner
        self._buffer_budget = buffer_budget
        self._idle_step_s = idle_step_s
        self.registry = WorkerRegistry(name, self._make_step_slot, buffer_budget, clock)
        self.steps = WorkerSteps(name, state, owner, self.registry, buffer_budget, idle_step_s, clock)
        self._segments: set[Segment] = set()

    def _make_step_slot(self) -> WorkerSlot:
        lock, steps = self._clock.rlock(), self.steps
        return WorkerSlot(self._name, self._state, lock, steps.commit, self._idle_step_s, steps.step_ended, self._clock)

    def report(self, name: str, *, leaving: bool, life: int = 0) -> ReportAnswer:
        """Handle a report: register a life of a worker, renew its lease, or end the life.

        Args:
            name: The worker.
            leaving: Whether the life ends.
            life: The number of the life; 0 if it has none yet, and asks for one.

        Raises:
            OptserveError: WORKER_REPLACED, SERVER_FULL, INVALID_FIELD if the optimizer has no workers, or see
                `Steps.check_usable`.
        """
        with self._owner.lock:
            self._owner.check_usable()
            lease_s = self.steps.consistency.lease_s
            worker = self.registry.find(name)
            if leaving:
                if worker is not None:
                    self._leave(worker, life)
                    self.steps.wake()
            # A report that asks for a number changes nothing for a live worker whose life has one.
            elif worker is None or life or not (worker.life and worker.alive):
                worker = self._admit(name, life, lease_s)
            last_request_id = worker.step_slot.last_request_id if worker else ""
            return ReportAnswer(
                lease_s, len(self.registry.alive), last_request_id, life or self.registry.new_life(name)
            )

    def _admit(self, name: str, life: int, lease_s: float) -> Worker:
        """Make a life of a worker alive, and end the earlier ones."""
        known = self.registry.find(name)
        replaces = known is not None and self.registry.claim(known, life)
        worker = self.registry.revive(name, lease_s, self._owner.step)
        worker.life = life
        if replaces:
            self._begin_life(worker)
        return worker

    def _begin_life(self, worker: Worker) -> None:
        """Withdraw the step of an earlier life, and forget the x that the server sent it."""
        worker.at_step = self._owner.step
        self.steps.withdraw(worker)
        self.steps.wake()

    def _leave(self, worker: Worker, life: int) -> None:
        self.registry.claim(worker, life)
        worker.lease_until = 0.0
        if life:
            # A report that was sent earlier and arrives later must not bring this life back.
            worker.life = life + 1
        self.steps.withdraw(worker)
        self._buffer_budget.reclaim(worker.step_slot)

    def act(self, name: str, life: int = 0) -> Worker:
        """The worker for a call of one of its lives; ends the earlier lives.

        Raises:
            OptserveError: WORKER_UNKNOWN, WORKER_REPLACED.
        """
        worker = self.registry.get(name)
        if self.registry.claim(worker, life):
            self._begin_life(worker)
        worker.renew(self.steps.consistency.lease_s)
        return worker

    def attach(self, name: str, stream: int, life: int = 0) -> Worker:
        """A worker has opened a stream: its earlier streams are abandoned, and make no more steps."""
        worker = self.act(name, life)
        if stream > worker.stream:
            worker.stream = stream
            # `opened` reports the last step now, so a step that waits on an earlier stream must not be applied later.
            self.steps.withdraw(worker)
            self.steps.wake()
        return worker

    def pulled(self, name: str, step: int, life: int = 0) -> None:
        """Note that the server sends a worker the x of a step."""
        with self._owner.lock:
            self.act(name, life).at_step = step

    def share(self) -> Segment | None:
        """A segment for a worker on this host, or None. The server copies gradients out of it and replies into it."""
        try:
            segment = Segment(self._state.layout, self._state.operand_kinds)
        except OSError as error:
            logger.warning("%s is not shared: %s", self._name, error)
            return None
        self._segments.add(segment)
        return segment

    def unshare(self, segment: Segment) -> None:
        """The client of the segment is gone."""
        self._segments.discard(segment)

    @property
    def shared_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size_bytes for segment in tuple(self._segments))

    def wake(self) -> None:
        """Wake the commits that wait, so that each checks whether it can go on."""
        with self._owner.lock:
            self.steps.wake()

    def evict_if_idle(self) -> None:
        """Discard all steps under way, or raise STEP_IN_PROGRESS if one has made progress lately."""
        for worker in self.registry:
            # Without waiting, because the locks are taken in the opposite order elsewhere.
            if not worker.step_slot.lock.acquire(blocking=False):
                raise worker.step_slot.in_progress()
            try:
                worker.step_slot.evict_if_idle()
            finally:
                worker.step_slot.lock.release()

    def check_none_alive(self, what: str, field: str) -> None:
        """Raise WORKERS_ATTACHED if workers are alive; `what` says what has to wait until they have left."""
        alive = len(self.registry.alive)
        if alive:
            raise refusals.workers_attached(self._name, alive, what, field)

    def take_buffers_back(self) -> None:
        """Drop all buffers, with their replies, because their size changes; raises STEP_IN_PROGRESS."""
        self.evict_if_idle()
        for worker in self.registry:
            self._buffer_budget.reclaim(worker.step_slot)

    def release(self) -> None:
        """The optimizer is deleted: give all buffers back, and wake all commits."""
        self.registry.clear()
        self._segments.clear()
        self.steps.clear()

    def drain(self) -> None:
        """The server is about to stop: refuse the commits that wait."""
        with self._owner.lock:
            self.steps.drain()

    def forget_replies(self) -> None:
        """The state was replaced: forget the replies and the steps under way."""
        with self._owner.lock:
            for worker in self.registry:
                self.steps.withdraw(worker)
                worker.step_slot.retained, worker.at_step = None, self._owner.step
            self.steps.wake()

    def discard_idle(self) -> None:
        """See StepSlot."""
        for worker in self.registry:
            worker.step_slot.discard_idle()
