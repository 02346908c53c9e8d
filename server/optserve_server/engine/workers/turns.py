"""Whose turn it is among the workers of one optimizer: their steps, from begin to the answer.

Each worker makes its steps in a step slot of its own, so that gradients arrive side by side; they are applied one after
the other under the optimizer's lock. A worker whose turn has not come waits in its commit, and nobody waits for one
that has left, or whose lease has run out. When a turn has come, and what becomes of the gradients that are there, the
optimizer's consistency decides.

Locks: a step slot's before the optimizer's. A commit that waits holds neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from optserve._common.clock import Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.step_slot import StepSlot
from optserve_server.engine.transaction import Outcome, Reply, Step
from optserve_server.engine.workers.buffer_budget import LOOK_EVERY_S, BufferBudget
from optserve_server.engine.workers.owner import Owner
from optserve_server.engine.workers.registry import Worker, WorkerRegistry
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.numerics.consistency import Consistency
from optserve_server.numerics.gradient_mean import Gradient
from optserve_server.numerics.headroom import ReplyWires
from optserve_server.numerics.state import State


class Turns:
    """The steps of all workers of one optimizer.

    Args:
        name: The optimizer's, for messages.
        state: Its state.
        owner: Its steps.
        registry: The workers.
        buffer_budget: Where the buffers come from.
        idle_step_s: See StepSlot.
        clock: The time.
    """

    def __init__(
        self,
        name: str,
        state: State,
        owner: Owner,
        registry: WorkerRegistry,
        buffer_budget: BufferBudget,
        idle_step_s: float,
        clock: Clock,
    ) -> None:
        self._monotonic = clock.monotonic
        self._name = name
        self._state = state
        self._owner = owner
        self._registry = registry
        self._buffer_budget = buffer_budget
        self._idle_step_s = idle_step_s
        self._draining = False
        # Those whose gradients are there, and not applied.
        self._giving: set[Worker] = set()
        # Counts what those who wait are told: what happens before they have begun to wait must not be missed.
        self._wakes = 0

    @property
    def consistency(self) -> Consistency:
        """What the optimizer is set to, or raise INVALID_FIELD where it has no workers."""
        consistency = self._state.settings.consistency
        if consistency is None:
            raise OptserveError(
                Reason.INVALID_FIELD, f"{self._name} has no consistency set, so it has no workers.", field="worker"
            )
        return consistency

    # With the optimizer's lock held.

    def wake(self) -> None:
        """Let those who wait look whether they still have to."""
        self._wakes += 1
        self._owner.lock.notify_all()

    def withdraw(self, worker: Worker) -> None:
        """What a worker has brought is not to be applied any more."""
        worker.contribution = None
        self._giving.discard(worker)

    def clear(self) -> None:
        """The optimizer is deleted: let nobody wait."""
        self._giving.clear()
        self.wake()

    def drain(self) -> None:
        """The server is about to stop: let nobody wait any more."""
        self._draining = True
        self.wake()

    # With no lock held.

    def hand_over(self, worker: Worker, stream: int | None, life: int, make: Callable[[StepSlot], Step]) -> Step:
        """Give a worker's step slot to a new step of a life, by a stream, which `make` makes with all locks held."""
        while True:
            self._buffer_budget.equip(worker.step_slot)
            with worker.step_slot.lock, self._owner.lock:
                if worker.step_slot.equipped:
                    try:
                        self._registry.check_current(worker, stream, life)
                        _evict_given_up(worker)
                        step = make(worker.step_slot)
                    except BaseException:
                        if worker.step_slot.holder is None:
                            self._buffer_budget.rest(worker.step_slot)
                        raise
                    if not worker.step_slot.equipped:
                        # It was that of a step which had stalled, and somebody has been waiting for it.
                        continue
                    if worker.contribution is not None or worker.step_slot.holder is not None:
                        # What a connection that was given up had brought does not count.
                        self.withdraw(worker)
                        self.wake()
                    worker.step_slot.holder, worker.step_slot.worker_name = step, worker.name
                    self._registry.holds(worker)
                    self._buffer_budget.use(worker.step_slot)
                    return step

    def given_back(self, step_slot: WorkerSlot) -> None:
        """A step has ended."""
        with self._owner.lock:
            worker = self._registry.find(step_slot.worker_name)
            if worker is None or not worker.alive:
                # It was alive because of the step only.
                self.wake()
        self._buffer_budget.rest(step_slot)

    def commit(self, step: Step) -> Outcome:
        """Wait for a step's turn, and apply it, or what it completes."""
        lock = self._owner.lock
        with lock:
            worker = self._acting(step)
        if step.segment is not None:
            with worker.step_slot.lock:
                worker.step_slot.take_shared(step)
        try:
            while True:
                with worker.step_slot.lock, lock:
                    wakes_seen = self._wakes
                    outcome = step.outcome or self._try(worker, step)
                if outcome is not None:
                    break
                with lock:
                    self._wait(worker, step, wakes_seen)
        finally:
            # What has failed must not count later.
            with lock:
                if worker.contribution is step:
                    self.withdraw(worker)
        if step.segment is not None:
            with worker.step_slot.lock:
                worker.step_slot.hold(step)
                worker.step_slot.give_shared(step, outcome.step)
        return outcome

    def _acting(self, step: Step) -> Worker:
        """The worker that makes a step, if the step may still be made."""
        worker = self._registry.get(step.worker)
        self._registry.check_current(worker, step.stream, step.life)
        worker.renew(self.consistency.lease_s)
        return worker

    def _try(self, worker: Worker, step: Step) -> Outcome | None:
        """Let a step go on as far as it can now."""
        self._acting(step)
        worker.step_slot.hold(step)
        if step.refused is not None:
            raise step.refused.again()
        self._owner.check_usable()
        self._owner.check_lineage(step.lineage)
        if step.replay and worker.step_slot.retained:
            step.reply_source = worker.step_slot.staging.updates
            worker.step_slot.check_replay(step)
            return Outcome(step.request_id, worker.step_slot.retained.step, replayed=True)
        # A replay has brought nothing, and must not be applied should its reply have gone.
        step.check_complete()
        self._contribute(worker, step, self.consistency)
        return step.outcome

    def _contribute(self, worker: Worker, step: Step, consistency: Consistency) -> None:
        """A worker's gradient is there: apply it, or what it completes, if its turn has come."""
        consistency.check_gradient(self._name, step.parameters_step, self._owner.step)
        others = (other.contribution for other in self._giving if other is not worker)
        consistency.check_alike(step.payload.selection, (other.payload.selection for other in others if other))
        worker.contribution = step
        self._giving.add(worker)
        if consistency.may_apply(worker.clock, len(self._giving), self._registry):
            self._apply(consistency, consistency.contributors(worker, self._giving))
            if consistency.may_wake_others(worker.clock, self._registry):
                self.wake()

    def _wait(self, worker: Worker, step: Step, wakes_seen: int) -> None:
        """Until something has happened that may let the step go on, beyond what had when `wakes_seen` was read."""
        if step.outcome is not None or step.refused is not None:
            return
        if step.given_up:
            self.withdraw(worker)
            raise OptserveError(
                Reason.CLIENT_GONE, f"The client of worker {worker.name!r} has gone while its step waited for others."
            )
        if self._draining:
            self.withdraw(worker)
            raise OptserveError(Reason.DRAINING, "This server is about to stop; try again when it is back.")
        consistency = self.consistency
        living = self._registry.alive
        if len(living) < consistency.needed:
            self.withdraw(worker)
            raise self._registry.too_few(consistency.needed)
        if self._buffer_budget.is_wanted(worker.step_slot):
            # Perhaps by the very worker that this step waits for.
            self.withdraw(worker)
            raise self._buffer_budget.refusal(worker.step_slot)
        now = self._monotonic()
        if worker.alive:
            worker.renew(consistency.lease_s)
        step.moved_at = now
        # One whose lease is over and that is still alive is in the middle of a step, and its end will be told.
        leases = [other.lease_until - now for other in living if other is not worker]
        timeout_s = min((lease_s for lease_s in leases if lease_s > 0), default=consistency.lease_s)
        # A lease that runs out is not told, nor that room is wanted.
        self._owner.lock.wait_for(
            lambda: self._wakes != wakes_seen, min(timeout_s, self._idle_step_s / 2, LOOK_EVERY_S)
        )

    def _apply(self, consistency: Consistency, taken: Collection[Worker]) -> None:
        """Make one step of the gradients of some workers, in the order of their names."""
        there = sorted(taken, key=lambda worker: worker.name)
        steps = [step for worker in there if (step := worker.contribution) is not None]
        payload, owner = steps[0].payload, self._owner
        given = [Gradient(worker.step_slot.staging, step.largest) for worker, step in zip(there, steps, strict=True)]
        gradient = consistency.merge(payload, given, owner.main.overwrite)
        stale = [owner.step - step.parameters_step for step in steps]
        made = [(worker.name, step.request_id, worker.clock + 1) for worker, step in zip(there, steps, strict=True)]
        scaled_by = consistency.scaled_by(max(stale))
        try:
            written = owner.committer.prepare(
                gradient.staging, payload, gradient.largest, _answers(steps), made, staleness=scaled_by
            )
        except OptserveError as error:
            if error.reason in (Reason.GRADIENT_OVERFLOW, Reason.REPLY_OVERFLOW):
                self._refuse_all(there, steps, error)
            raise
        norm = owner.committer.apply(written)
        for worker, step, staleness in zip(there, steps, stale, strict=True):
            if step.replies is Reply.UPDATES and worker.step_slot.staging is not gradient.staging:
                worker.step_slot.staging.copy_updates(gradient.staging.updates, payload)
            self._answer(worker, step, Outcome(step.request_id, owner.step, False, norm, staleness))
            self.withdraw(worker)

    def _refuse_all(self, there: Sequence[Worker], steps: Sequence[Step], error: OptserveError) -> None:
        """The step that these were to make together cannot be applied: none of them waits for another one."""
        for worker, step in zip(there, steps, strict=True):
            step.refused = error
            self.withdraw(worker)
        self.wake()

    def _answer(self, worker: Worker, step: Step, outcome: Outcome) -> None:
        """A worker's step has been applied, and its buffer takes the reply."""
        step_slot = worker.step_slot
        if step.replies is Reply.PARAMETERS:
            step_slot.staging.copy_updates(self._state.parameters, step.payload)
            worker.at_step = outcome.step
        step.reply_source = step_slot.staging.updates
        if step_slot.retained is not None:
            step_slot.retained.intact, step_slot.retained.holds = True, step.replies
        step.committed, step.moved_at, step.outcome = True, self._monotonic(), outcome


def _evict_given_up(worker: Worker) -> None:
    """Let go what an earlier life or a given-up stream has begun; another may begin before that has ended."""
    holder = worker.step_slot.holder
    if holder is None:
        return
    if holder.life != worker.life or (holder.stream is not None and holder.stream < worker.stream):
        worker.step_slot.holder = None


def _answers(steps: Sequence[Step]) -> ReplyWires:
    """How the replies of a step are read that several have made."""
    if len(steps) == 1:
        return steps[0].reply_wires
    return ReplyWires(
        tuple(wire for step in steps for wire in step.reply_wires.updates),
        tuple(wire for step in steps for wire in step.reply_wires.parameters),
    )
