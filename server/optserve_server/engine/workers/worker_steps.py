"""The steps of an optimizer's workers, from begin to the answer.

Each worker has a step slot of its own, so their gradients can arrive at the same time. Steps are applied one after the
other, under the optimizer's lock. The optimizer's consistency decides when a step is applied, and of which gradients;
until then the worker waits in its commit. No worker waits for one that has left, or whose lease has run out.

Locks: take a step slot's lock before the optimizer's. A commit that waits holds neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from optserve._common.clock import Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.step_record import WorkerStep
from optserve_server.engine.step_slot import StepSlot
from optserve_server.engine.transaction import PARAMETERS, UPDATES, Outcome, Step
from optserve_server.engine.workers.buffer_budget import CHECK_EVERY_S, BufferBudget
from optserve_server.engine.workers.owner import Owner
from optserve_server.engine.workers.registry import Worker, WorkerRegistry
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.numerics.consistency import Consistency
from optserve_server.numerics.gradient_mean import Gradient
from optserve_server.numerics.headroom import ReplyWires
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import StepOptions


class WorkerSteps:
    """The steps of all workers of one optimizer.

    Args:
        name: The optimizer's, for messages.
        state: Its state.
        owner: Its steps.
        registry: The workers.
        buffer_budget: Gives the buffers.
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
        # The workers whose gradients have arrived and are not applied yet.
        self._contributors: set[Worker] = set()
        # Counts the wake-ups, so that a commit does not miss one before it has begun to wait.
        self._wake_count = 0

    @property
    def consistency(self) -> Consistency:
        """The optimizer's consistency; raises INVALID_FIELD if it has none, and so no workers."""
        consistency = self._state.settings.consistency
        if consistency is None:
            raise OptserveError(
                Reason.INVALID_FIELD, f"{self._name} has no consistency set, so it has no workers.", field="worker"
            )
        return consistency

    # With the optimizer's lock held.

    def wake(self) -> None:
        """Wake the commits that wait, so that each checks whether it can go on."""
        self._wake_count += 1
        self._owner.lock.notify_all()

    def withdraw(self, worker: Worker) -> None:
        """Do not apply the gradient of this worker."""
        worker.contribution = None
        self._contributors.discard(worker)

    def clear(self) -> None:
        """The optimizer is deleted: wake all commits."""
        self._contributors.clear()
        self.wake()

    def drain(self) -> None:
        """The server is about to stop: refuse the commits that wait."""
        self._draining = True
        self.wake()

    # With no lock held.

    def begin(self, worker: Worker, stream: int | None, life: int, make: Callable[[StepSlot], Step]) -> Step:
        """Begin a step of a worker's life on a stream; `make` makes it with all locks held."""
        while True:
            self._buffer_budget.ensure_buffer(worker.step_slot)
            with worker.step_slot.lock, self._owner.lock:
                if worker.step_slot.is_outgrown:
                    self._buffer_budget.reclaim(worker.step_slot)
                if worker.step_slot.buffer is not None:
                    try:
                        self._registry.check_current(worker, stream, life)
                        _evict_abandoned(worker)
                        step = make(worker.step_slot)
                    except BaseException:
                        if worker.step_slot.holder is None:
                            self._buffer_budget.mark_idle(worker.step_slot)
                        raise
                    if worker.step_slot.buffer is None:
                        # `make` has discarded an idle step, and the budget has given its buffer to another worker.
                        continue
                    if worker.contribution is not None or worker.step_slot.holder is not None:
                        # The gradient of an abandoned stream does not count.
                        self.withdraw(worker)
                        self.wake()
                    worker.step_slot.holder, worker.step_slot.worker_name = step, worker.name
                    self._registry.holds(worker)
                    self._buffer_budget.mark_in_use(worker.step_slot)
                    return step

    def step_ended(self, step_slot: WorkerSlot) -> None:
        """A step has ended: its buffer may be taken back."""
        with self._owner.lock:
            worker = self._registry.find(step_slot.worker_name)
            if worker is None or not worker.alive:
                # The worker was alive only because of its step, so others may go on now.
                self.wake()
        self._buffer_budget.mark_idle(step_slot)

    def commit(self, step: Step) -> Outcome:
        """Wait until a step can be applied, alone or with those of others, and apply it."""
        lock = self._owner.lock
        with lock:
            worker = self._current_worker(step)
        if step.segment is not None:
            with worker.step_slot.lock:
                worker.step_slot.take_shared_gradients(step, step.segment)
        try:
            while True:
                with worker.step_slot.lock, lock:
                    wakes_seen = self._wake_count
                    outcome = step.outcome or self._advance(worker, step)
                if outcome is not None:
                    break
                with lock:
                    self._wait(worker, step, wakes_seen)
        finally:
            # A failed step must not be applied with a later one.
            with lock:
                if worker.contribution is step:
                    self.withdraw(worker)
        if step.segment is not None:
            with worker.step_slot.lock:
                worker.step_slot.check_holds(step)
                worker.step_slot.write_shared_reply(step, outcome.step)
        return outcome

    def _current_worker(self, step: Step) -> Worker:
        """The worker of a step, with its lease renewed; raises if its life or stream is not the present one."""
        worker = self._registry.get(step.worker)
        self._registry.check_current(worker, step.stream, step.life)
        worker.renew(self.consistency.lease_s)
        return worker

    def _advance(self, worker: Worker, step: Step) -> Outcome | None:
        """Try to apply a step; returns None if it has to wait."""
        self._current_worker(step)
        worker.step_slot.check_holds(step)
        if step.refused is not None:
            raise step.refused.copy()
        self._owner.check_usable()
        self._owner.check_lineage(step.lineage)
        if step.replay and worker.step_slot.retained:
            step.reply_source = worker.step_slot.staging.updates
            worker.step_slot.check_replay(step)
            return worker.step_slot.retained.replayed()
        # Also catches a replay whose reply is lost: it has no gradients, and must not be applied.
        step.check_complete()
        self._contribute(worker, step, self.consistency)
        return step.outcome

    def _contribute(self, worker: Worker, step: Step, consistency: Consistency) -> None:
        """Count a worker's gradient as arrived, and apply it, alone or with others, if the consistency allows that."""
        consistency.check_gradient(self._name, step.parameters_step, self._owner.step)
        if self._contributors:
            others = (other.contribution for other in self._contributors if other is not worker)
            consistency.check_alike(step.payload.selection, (other.payload.selection for other in others if other))
        worker.contribution = step
        self._contributors.add(worker)
        if consistency.may_apply(worker.clock, len(self._contributors), self._registry):
            try:
                self._apply(consistency, consistency.contributors(worker, self._contributors))
            except BaseException:
                # Before the lock is released: otherwise another worker's commit could use the refused gradient.
                self.withdraw(worker)
                raise
            if consistency.may_wake_others(worker.clock, self._registry):
                self.wake()

    def _wait(self, worker: Worker, step: Step, wakes_seen: int) -> None:
        """Wait for a wake-up since `wakes_seen` was read, for a lease to run out, or for a second."""
        if step.outcome is not None or step.refused is not None:
            return
        if step.abandoned:
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
        if self._buffer_budget.is_needed_elsewhere(worker.step_slot):
            # The worker that this step waits for may need the buffer.
            self.withdraw(worker)
            raise self._buffer_budget.refusal(worker.step_slot)
        now = self._monotonic()
        if worker.alive:
            worker.renew(consistency.lease_s)
        step.last_progress_at = now
        # A worker without a lease that is still alive is in the middle of a step, whose end will wake this one.
        leases = [other.lease_until - now for other in living if other is not worker]
        timeout_s = min((lease_s for lease_s in leases if lease_s > 0), default=consistency.lease_s)
        # No wake-up says that a lease has run out, or that another worker needs the buffer.
        self._owner.lock.wait_for(
            lambda: self._wake_count != wakes_seen, min(timeout_s, self._idle_step_s / 2, CHECK_EVERY_S)
        )

    def _apply(self, consistency: Consistency, taken: Collection[Worker]) -> None:
        """Make one step of the gradients of some workers, in the order of their names."""
        workers = sorted(taken, key=_name_of) if len(taken) > 1 else list(taken)
        owner, steps = self._owner, []
        given: list[Gradient] = []
        stale: list[int] = []
        made: list[WorkerStep] = []
        for worker in workers:
            step = worker.contribution
            if step is None:
                continue
            steps.append(step)
            given.append(Gradient(worker.step_slot.staging, step.largest))
            stale.append(owner.step - step.parameters_step)
            made.append(WorkerStep(worker.name, step.request_id, worker.clock + 1))
        payload = steps[0].payload
        gradient = consistency.merge(payload, given, owner.main.reuse_staging)
        scaled_by = consistency.scaled_by(max(stale))
        try:
            written = owner.committer.prepare(
                gradient, payload, _reply_wires_of(steps), made, options=_options_of(steps), staleness=scaled_by
            )
        except OptserveError as error:
            if error.reason in (Reason.GRADIENT_OVERFLOW, Reason.REPLY_OVERFLOW):
                self._refuse_all(workers, steps, error)
            raise
        effect = owner.committer.apply(written)
        for worker, step, staleness in zip(workers, steps, stale, strict=True):
            if step.replies is UPDATES and worker.step_slot.staging is not gradient.staging:
                worker.step_slot.staging.copy_updates(gradient.staging.updates, payload)
            self._answer(worker, step, Outcome(step.request_id, owner.step, False, effect, staleness))
            self.withdraw(worker)

    def _refuse_all(self, workers: Sequence[Worker], steps: Sequence[Step], error: OptserveError) -> None:
        """Refuse all steps that were to be applied together."""
        for worker, step in zip(workers, steps, strict=True):
            step.refused = error
            self.withdraw(worker)
        self.wake()

    def _answer(self, worker: Worker, step: Step, outcome: Outcome) -> None:
        """A worker's step was applied: put the reply into its buffer."""
        step_slot = worker.step_slot
        staging = step_slot.staging
        if step.replies is PARAMETERS:
            staging.copy_updates(self._state.parameters, step.payload)
            worker.at_step = outcome.step
        step.reply_source = staging.updates
        if step_slot.retained is not None:
            step_slot.retained.intact, step_slot.retained.holds = True, step.replies
            step_slot.retained.effect, step_slot.retained.staleness = outcome.effect, outcome.staleness
        step.committed, step.last_progress_at, step.outcome = True, self._monotonic(), outcome


def _name_of(worker: Worker) -> str:
    return worker.name


def _evict_abandoned(worker: Worker) -> None:
    """Drop the step of an earlier life or an abandoned stream, which may not have ended yet."""
    holder = worker.step_slot.holder
    if holder is None:
        return
    if holder.life != worker.life or (holder.stream is not None and holder.stream < worker.stream):
        worker.step_slot.holder = None


def _options_of(steps: Sequence[Step]) -> StepOptions:
    """What the steps ask for that are applied together; several have no settings of their own."""
    if len(steps) == 1:
        return steps[0].options
    return StepOptions(with_norm=any(step.options.with_norm for step in steps))


def _reply_wires_of(steps: Sequence[Step]) -> ReplyWires:
    """The narrow wire dtypes of the replies of several steps that are applied together."""
    if len(steps) == 1:
        return steps[0].reply_wires
    return ReplyWires(
        tuple(wire for step in steps for wire in step.reply_wires.updates),
        tuple(wire for step in steps for wire in step.reply_wires.parameters),
    )
