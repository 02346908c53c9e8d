"""Several workers on one optimizer: whose turn it is, and how their gradients come together.

Each worker makes its steps in a step slot of its own, so that gradients arrive side by side; they are applied one after
the other under the optimizer's lock. A worker whose turn has not come waits in its commit, and nobody waits for one
that has left, or whose lease has run out.

Locks: a step slot's before the optimizer's. A commit that waits holds neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain import refusals
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import Outcome, Reply, Step
from optserve_server.engine.workers.buffer_budget import LOOK_EVERY_S, BufferBudget
from optserve_server.engine.workers.merge import merge
from optserve_server.engine.workers.owner import Owner
from optserve_server.engine.workers.registry import Standing, Worker, WorkerRegistry
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.numerics.consistency import Consistency
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
        registry: Who they are.
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
        self._clock, self._monotonic = clock, clock.monotonic
        self._name = name
        self._state = state
        self._owner = owner
        self._buffer_budget = buffer_budget
        self._idle_step_s = idle_step_s
        self.registry = WorkerRegistry(name, self._make_step_slot, buffer_budget, clock)
        self._draining = False
        self._segments: set[Segment] = set()
        # Those whose steps wait for the others', in sync.
        self._giving: set[Worker] = set()
        # Counts what those who wait are told: what happens before they have begun to wait must not be missed.
        self._wakes = 0

    def _wake_waiting(self) -> None:
        """Let those who wait look again; with the optimizer's lock held."""
        self._wakes += 1
        self._owner.lock.notify_all()

    @property
    def _consistency(self) -> Consistency:
        consistency = self._state.settings.consistency
        if consistency is None:
            raise OptserveError(
                Reason.INVALID_FIELD, f"{self._name} has no consistency set, so it has no workers.", field="worker"
            )
        return consistency

    def _make_step_slot(self) -> WorkerSlot:
        lock = self._clock.rlock()
        return WorkerSlot(self._name, self._state, lock, self._commit, self._idle_step_s, self._given_back, self._clock)

    def report(self, name: str, *, leaving: bool, life: int = 0) -> Standing:
        """Register a life of a worker, renew its lease, or let it go; without its number, give it one.

        Raises:
            OptserveError: WORKER_REPLACED, SERVER_FULL, INVALID_FIELD where there are no workers, or what every step
                is refused with.
        """
        with self._owner.lock:
            self._owner.check_usable()
            lease_s = self._consistency.lease_s
            worker = self.registry.find(name)
            if leaving:
                if worker is not None:
                    self._leave(worker, life)
                    self._wake_waiting()
            # Who asks for a number takes nothing from a life that has one.
            elif worker is None or life or not (worker.life and worker.alive):
                worker = self._admit(name, life, lease_s)
            last_request_id = worker.step_slot.last_request_id if worker else ""
            return Standing(lease_s, len(self.registry.alive), last_request_id, life or self.registry.new_life(name))

    def _admit(self, name: str, life: int, lease_s: float) -> Worker:
        """Let a life of a worker be alive, which ends others before it."""
        known = self.registry.find(name)
        replaces = known is not None and self.registry.claim(known, life)
        worker = self.registry.revive(name, lease_s, self._owner.step)
        worker.life = life
        if replaces:
            self._begin_life(worker)
        return worker

    def _begin_life(self, worker: Worker) -> None:
        """Let nothing be made any more that a life before has under way, and forget which x it had."""
        worker.at_step = self._owner.step
        self._withdraw(worker)
        self._wake_waiting()

    def _leave(self, worker: Worker, life: int) -> None:
        self.registry.claim(worker, life)
        worker.lease_until = 0.0
        if life:
            # A report that it has sent before, and that arrives after this, must not bring it back.
            worker.life = life + 1
        self._withdraw(worker)
        self._buffer_budget.strip(worker.step_slot)

    def act(self, name: str, life: int = 0) -> Worker:
        """The worker as which a life does something, which ends others before it.

        Raises:
            OptserveError: WORKER_UNKNOWN, WORKER_REPLACED.
        """
        worker = self.registry.get(name)
        if self.registry.claim(worker, life):
            self._begin_life(worker)
        worker.renew(self._consistency.lease_s)
        return worker

    def attach(self, name: str, stream: int, life: int = 0) -> Worker:
        """A worker has opened a stream: those that it opened before have been given up, and make no steps any more."""
        worker = self.act(name, life)
        if stream > worker.stream:
            worker.stream = stream
            # It is told now what was made last, and what waits with an earlier one must not be made after that.
            self._withdraw(worker)
            self._wake_waiting()
        return worker

    def _acting(self, step: Step) -> Worker:
        """The worker that makes a step, if the step may still be made."""
        worker = self.registry.get(step.worker)
        self._check_current(worker, step.stream, step.life)
        worker.renew(self._consistency.lease_s)
        return worker

    def _check_current(self, worker: Worker, stream: int | None, life: int) -> None:
        """Raise WORKER_REPLACED for an earlier life, STEP_TAKEN_OVER for a stream that this one has given up."""
        if life != worker.life:
            raise refusals.worker_replaced(self._name, worker.name)
        if stream is not None and stream < worker.stream:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER, f"Worker {worker.name!r} of {self._name} has opened another stream since."
            )

    # Steps.

    def hand_over(self, worker: Worker, stream: int | None, life: int, make: Callable[[WorkerSlot], Step]) -> Step:
        """Give a worker's step slot to a new step of a life, by a stream, which `make` makes with all locks held."""
        while True:
            self._buffer_budget.equip(worker.step_slot)
            with worker.step_slot.lock, self._owner.lock:
                if worker.step_slot.equipped:
                    try:
                        self._check_current(worker, stream, life)
                        self._evict_given_up(worker)
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
                        self._withdraw(worker)
                        self._wake_waiting()
                    worker.step_slot.holder, worker.step_slot.worker_name = step, worker.name
                    self.registry.holds(worker)
                    self._buffer_budget.use(worker.step_slot)
                    return step

    def _evict_given_up(self, worker: Worker) -> None:
        """Let go what an earlier life or a given-up stream has begun; another may begin before that has ended."""
        holder = worker.step_slot.holder
        if holder is None:
            return
        if holder.life != worker.life or (holder.stream is not None and holder.stream < worker.stream):
            worker.step_slot.holder = None

    def _given_back(self, step_slot: WorkerSlot) -> None:
        """A step has ended."""
        with self._owner.lock:
            worker = self.registry.find(step_slot.worker_name)
            if worker is None or not worker.alive:
                # It was alive because of the step only.
                self._wake_waiting()
        self._buffer_budget.rest(step_slot)

    def pulled(self, name: str, step: int, life: int = 0) -> None:
        """A worker has been given the x of a step."""
        with self._owner.lock:
            self.act(name, life).at_step = step

    def share(self) -> Segment | None:
        """Memory for a worker on this host, out of which its gradients are copied, and into which its replies are."""
        try:
            segment = Segment(self._state.layout, self._state.operand_kinds)
        except OSError as error:
            logger.warning("%s is not shared: %s", self._name, error)
            return None
        self._segments.add(segment)
        return segment

    def unshare(self, segment: Segment) -> None:
        """The worker has gone."""
        self._segments.discard(segment)

    @property
    def shared_bytes(self) -> int:
        """Bytes of what is shared."""
        return sum(segment.size_bytes for segment in tuple(self._segments))

    def wake(self) -> None:
        """Let those who wait look whether they still have to."""
        with self._owner.lock:
            self._wake_waiting()

    def evict_if_idle(self) -> None:
        """Discard all steps under way, or raise STEP_IN_PROGRESS if one has moved lately."""
        for worker in self.registry:
            # Not in the usual order of locks, so not to be waited for.
            if not worker.step_slot.lock.acquire(blocking=False):
                raise worker.step_slot.in_progress()
            try:
                worker.step_slot.evict_if_idle()
            finally:
                worker.step_slot.lock.release()

    def release(self) -> None:
        """The optimizer is deleted: give the room back, and let nobody wait."""
        self.registry.clear()
        self._giving.clear()
        self._segments.clear()
        self._wake_waiting()

    def drain(self) -> None:
        """Let nobody wait any more."""
        with self._owner.lock:
            self._draining = True
            self._wake_waiting()

    def _commit(self, step: Step) -> Outcome:
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
                    self._withdraw(worker)
        if step.segment is not None:
            with worker.step_slot.lock:
                worker.step_slot.hold(step)
                worker.step_slot.give_shared(step, outcome.step)
        return outcome

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
        self._make_progress(worker, step)
        return step.outcome

    def _make_progress(self, worker: Worker, step: Step) -> None:
        """Apply a step, or what it completes, if its turn has come."""
        consistency = self._consistency
        if consistency.kind == "sync":
            if step.parameters_step != self._owner.step:
                raise refusals.gradient_late(self._name, self._owner.step, step.parameters_step)
            # All of them are alike.
            other = next((other.contribution for other in self._giving if other is not worker), None)
            if other is not None and other.payload.tensors != step.payload.tensors:
                raise OptserveError(
                    Reason.INVALID_FIELD,
                    "The gradients of one step are of the same parameters; other workers' are of others.",
                    field="tensors",
                )
            worker.contribution = step
            self._giving.add(worker)
            self._merge_if_complete(consistency.workers)
        elif consistency.kind == "async" or worker.clock - self.registry.slowest(worker.clock) <= consistency.staleness:
            self._apply(worker, step)

    def _wait(self, worker: Worker, step: Step, wakes_seen: int) -> None:
        """Until something has happened that may let the step go on, beyond what was `told`."""
        if step.outcome is not None or step.refused is not None:
            return
        if step.given_up or self._draining:
            self._withdraw(worker)
            raise OptserveError(Reason.DRAINING, "This server is about to stop; try again when it is back.")
        consistency = self._consistency
        living = self.registry.alive
        if consistency.kind == "sync" and len(living) < consistency.workers:
            self._withdraw(worker)
            raise self.registry.too_few(consistency.workers)
        if self._buffer_budget.is_wanted(worker.step_slot):
            # Perhaps by the very worker that this step waits for.
            self._withdraw(worker)
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

    def _withdraw(self, worker: Worker) -> None:
        worker.contribution = None
        self._giving.discard(worker)

    def _apply(self, worker: Worker, step: Step) -> None:
        """One worker's gradient, as a step of its own."""
        staging, payload = worker.step_slot.staging, step.payload
        staleness = self._owner.step - step.parameters_step
        made = [(worker.name, step.request_id, worker.clock + 1)]
        scaled_by = staleness if self._consistency.scale_by_staleness else 0
        written = self._owner.prepare(staging, payload, step.largest, step.answers, made, staleness=scaled_by)
        norm = self._owner.apply(written)
        self._answer(worker, step, Outcome(step.request_id, self._owner.step, False, norm, staleness))
        if self._consistency.waits and self.registry.slowest(worker.clock) >= worker.clock:
            # It was the last of the slowest, for which others may wait.
            self._wake_waiting()

    def _merge_if_complete(self, needed: int) -> None:
        """The mean of all gradients for this step, once there are enough, summed in the order of the workers' names."""
        if len(self._giving) < needed:
            return
        there = sorted(self._giving, key=lambda worker: worker.name)
        steps = [step for worker in there if (step := worker.contribution) is not None]
        payload, mean = steps[0].payload, self._owner.main.overwrite()
        merged = merge(steps, [worker.step_slot.staging for worker in there], mean)
        made = [(w.name, step.request_id, w.clock + 1) for w, step in zip(there, steps, strict=True)]
        try:
            written = self._owner.prepare(mean, payload, *merged, made)
        except OptserveError as error:
            if error.reason in (Reason.GRADIENT_OVERFLOW, Reason.REPLY_OVERFLOW):
                self._refuse_all(there, steps, error)
            raise
        norm = self._owner.apply(written)
        for worker, step in zip(there, steps, strict=True):
            if step.replies is Reply.UPDATES:
                worker.step_slot.staging.copy_updates(mean.updates, payload)
            self._answer(worker, step, Outcome(step.request_id, self._owner.step, False, norm))
            self._withdraw(worker)
        self._wake_waiting()

    def _refuse_all(self, there: Sequence[Worker], steps: Sequence[Step], error: OptserveError) -> None:
        """The step that these were to make together cannot be applied: none of them waits for another one."""
        for worker, step in zip(there, steps, strict=True):
            step.refused = error
            self._withdraw(worker)
        self._wake_waiting()

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

    def forget_replies(self) -> None:
        """The state is another one: no step that was made is a step of it."""
        with self._owner.lock:
            for worker in self.registry:
                self._withdraw(worker)
                worker.step_slot.retained, worker.at_step = None, self._owner.step
            self._wake_waiting()

    def discard_idle(self) -> None:
        """See StepSlot."""
        for worker in self.registry:
            worker.step_slot.discard_idle()
