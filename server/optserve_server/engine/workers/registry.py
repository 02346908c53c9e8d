"""The workers of one optimizer: which are alive, how many steps each has made, and what is written down of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain import refusals
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import Retained, Step
from optserve_server.engine.workers.buffer_budget import BufferBudget
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.numerics.layout import Selection

MAX_NAMED = 8
"""Most workers that an error names."""

MAX_KNOWN = 5_000
"""Most workers of one optimizer that the server remembers, dead ones included; it forgets the longest dead first."""


@dataclass(eq=False)
class Worker:
    """One worker.

    Attributes:
        name: The name that the worker has chosen.
        step_slot: Where the worker makes its steps.
        monotonic: Returns the monotonic time, in seconds.
        clock: Steps that the worker has made; at least the clock of the slowest live worker when it entered.
        at_step: Step of the x that the server has sent the worker last.
        lease_until: End of the lease by the monotonic clock; 0 if the worker has left, or has not reported since this
            server started.
        seen_at: Time of the last report, step or recovery of the worker, by the monotonic clock.
        contribution: The step whose gradient has arrived and is not applied yet.
        stream: Number of the stream that the worker has opened last; earlier streams make no more steps.
        life: Number of the present life; lives with lower numbers are over. 0 for a client that sends no number.
    """

    name: str
    step_slot: WorkerSlot
    monotonic: Callable[[], float] = field(repr=False)
    clock: int = 0
    at_step: int = 0
    lease_until: float = 0.0
    seen_at: float = 0.0
    contribution: Step | None = field(default=None, repr=False)
    stream: int = 0
    life: int = 0

    @property
    def alive(self) -> bool:
        """Whether the lease holds, or the worker is in the middle of a step."""
        return self.lease_until > self.monotonic() or (self.lease_until > 0 and self.step_slot.holder is not None)

    def renew(self, lease_s: float) -> None:
        """Let the lease last for at least `lease_s` seconds from now."""
        self.lease_until = max(self.lease_until, self.monotonic() + lease_s)


class ReportAnswer(NamedTuple):
    """The answer to a worker's report.

    Attributes:
        lease_s: Seconds that the lease lasts from now.
        live_workers: Number of live workers.
        last_request_id: Request id of the last step under the worker's name; empty if there is none.
        life: The number of the worker's life, or of a life that it may begin.
    """

    lease_s: float
    live_workers: int
    last_request_id: str
    life: int


class WorkerRegistry:
    """All workers of one optimizer that the server remembers. Use it under the optimizer's lock.

    Args:
        name: The optimizer's name, for messages.
        make_step_slot: Makes the step slot of a new worker.
        buffer_budget: Takes back the buffers of workers that are forgotten.
        clock: The time.
    """

    def __init__(
        self,
        name: str,
        make_step_slot: Callable[[], WorkerSlot],
        buffer_budget: BufferBudget,
        clock: Clock = SYSTEM,
    ) -> None:
        self._clock = clock
        self._name = name
        self._make_step_slot = make_step_slot
        self._buffer_budget = buffer_budget
        self._known: dict[str, Worker] = {}
        # Workers that may be alive. Each step looks only at these, because thousands may be dead.
        self._living: dict[str, Worker] = {}
        self._newest_life = 0

    def __iter__(self) -> Iterator[Worker]:
        """All workers at the moment, dead ones included."""
        return iter(tuple(self._known.values()))

    @property
    def alive(self) -> list[Worker]:
        """The live workers."""
        living = [worker for worker in self._living.values() if worker.alive]
        if len(living) < len(self._living):
            self._living = {worker.name: worker for worker in living}
        return living

    def holds(self, worker: Worker) -> None:
        """A worker has begun a step, so it is alive until the step ends."""
        self._living[worker.name] = worker

    def too_few(self, needed: int) -> OptserveError:
        """The error for a step that needs more workers than are alive; names live workers and dead ones."""
        alive = self.alive
        gone = sorted((worker for worker in self if not worker.alive), key=lambda worker: -worker.seen_at)
        there = f" ({_names(alive)})" if alive else ""
        return OptserveError(
            Reason.TOO_FEW_WORKERS,
            f"A step of {self._name} takes {needed} workers, of which {len(alive)} are alive{there}."
            + (f" No longer alive: {_names(gone)}." if gone else ""),
            live_workers=len(alive),
            workers=needed,
        )

    def slowest(self, default: int) -> int:
        """The least clock of all live workers; `default` if there are none."""
        return min((worker.clock for worker in self.alive), default=default)

    def find(self, name: str) -> Worker | None:
        """A worker that the server remembers, dead or alive; or None."""
        return self._known.get(name)

    def get(self, name: str) -> Worker:
        """A live worker; raises WORKER_UNKNOWN."""
        worker = self._known.get(name)
        if worker is None or not worker.alive:
            raise OptserveError(
                Reason.WORKER_UNKNOWN,
                f"{name[:64]!r} is not a worker of {self._name}, or its lease has run out; report it alive.",
                field="worker",
                worker=name[:64],
            )
        return worker

    def check_current(self, worker: Worker, stream: int | None, life: int) -> None:
        """Raise WORKER_REPLACED for an earlier life, STEP_TAKEN_OVER for a stream that the worker has abandoned."""
        if life != worker.life:
            raise refusals.worker_replaced(self._name, worker.name)
        if stream is not None and stream < worker.stream:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER, f"Worker {worker.name!r} of {self._name} has opened another stream since."
            )

    def new_life(self, name: str) -> int:
        """A number for a life that may begin, greater than all numbers that were given here or used under that name.

        Numbers also grow from one start of the server to the next, unless its clock goes back.
        """
        self._newest_life = max(self._newest_life + 1, self._clock.time_ns())
        worker = self._known.get(name)
        return max(self._newest_life, worker.life + 1) if worker else self._newest_life

    def claim(self, worker: Worker, life: int) -> bool:
        """Let a life act under a worker's name; returns whether that ends another life.

        Raises:
            OptserveError: WORKER_REPLACED.
        """
        if life == worker.life:
            return False
        # Lives without a number cannot be told apart, so such a life may act while no other life is alive.
        if life < worker.life and (life or worker.alive):
            raise refusals.worker_replaced(self._name, worker.name)
        worker.life = life
        return True

    def revive(self, name: str, lease_s: float, step: int) -> Worker:
        """Make a worker alive for `lease_s` seconds; `step` is the step of the optimizer, for a worker that was dead.

        Raises:
            OptserveError: SERVER_FULL.
        """
        worker = self._known.get(name) or self._remember(name)
        if not worker.alive:
            # So others do not have to wait until it has caught up, and it does not have to wait for another new one.
            newest = max(other.clock for other in self)
            worker.clock = max(worker.clock, self.slowest(newest))
            worker.at_step = step
        worker.lease_until = self._clock.monotonic() + lease_s
        worker.seen_at = self._clock.monotonic()
        self._living[name] = worker
        return worker

    def _remember(self, name: str) -> Worker:
        if len(self._known) >= MAX_KNOWN:
            dead = [worker for worker in self if not worker.alive]
            if not dead:
                raise OptserveError(
                    Reason.SERVER_FULL,
                    f"{self._name} has {MAX_KNOWN} live workers, and this server allows no more.",
                    limit=MAX_KNOWN,
                )
            oldest = min(dead, key=lambda worker: worker.seen_at)
            self._buffer_budget.reclaim(oldest.step_slot)
            del self._known[oldest.name]
            self._living.pop(oldest.name, None)
        worker = self._known[name] = Worker(name, self._make_step_slot(), self._clock.monotonic)
        return worker

    def clear(self) -> None:
        """Forget all workers, and take their buffers back."""
        for worker in self:
            self._buffer_budget.reclaim(worker.step_slot)
        self._known.clear()
        self._living.clear()

    # What is written down.

    def made_step(self, name: str, retained: Retained, clock: int) -> None:
        """A worker has made a step, now or before this server started; `clock` is its clock after the step."""
        worker = self._known.get(name) or self._remember(name)
        worker.step_slot.retained, worker.clock, worker.seen_at = retained, clock, self._clock.monotonic()

    def to_json(self) -> dict[str, Any]:
        """The form on disk of all workers that have made steps."""
        return {
            worker.name: [worker.clock, retained.request_id, retained.step, retained.selection.listed]
            for worker in self
            if (retained := worker.step_slot.retained) is not None
        }

    def from_json(self, content: dict[str, Any]) -> None:
        """The reverse of `to_json`."""
        for name, (clock, request_id, step, tensors) in content.items():
            self.made_step(name, Retained(request_id, step, Selection(tuple(tensors)), intact=False), clock)


def _names(workers: list[Worker]) -> str:
    """The names of the first workers, as a text."""
    names = ", ".join(repr(worker.name) for worker in workers[:MAX_NAMED])
    return names + (f" and {len(workers) - MAX_NAMED} more" if len(workers) > MAX_NAMED else "")
