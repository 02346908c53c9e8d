"""Who the workers of one optimizer are: which are alive, what each has done, and what of that outlives the process."""

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
"""Workers that an error names."""

MAX_KNOWN = 5_000
"""Workers of one optimizer that are remembered, dead ones included; the longest dead are forgotten first."""


@dataclass(eq=False)
class Worker:
    """One worker.

    Attributes:
        monotonic: The time.
        clock: Steps that it has made, or the clock of the slowest when it came.
        at_step: Step of the x that it was given last.
        lease_until: By the monotonic clock; 0 if it has left, or not reported since this server started.
        seen_at: When it was last heard of.
        contribution: Its step whose gradient is there, and not applied: it waits for others.
        stream: Number of the stream that it has opened last; earlier ones make no steps any more.
        life: Number of the life that has the name now; lower ones are over. 0 for a client that sends none.
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
        """Whether its lease holds; one in the middle of a step is alive."""
        return self.lease_until > self.monotonic() or (self.lease_until > 0 and self.step_slot.holder is not None)

    def renew(self, lease_s: float) -> None:
        """Let it live for so many seconds at least."""
        self.lease_until = max(self.lease_until, self.monotonic() + lease_s)


class Standing(NamedTuple):
    """What a worker that has reported is told.

    Attributes:
        lease_s: How long it lives from now, in seconds.
        live_workers: How many are alive.
        last_request_id: Of the last step under its name; empty if there is none.
        life: The number of its life, or of one that it may begin.
    """

    lease_s: float
    live_workers: int
    last_request_id: str
    life: int


class WorkerRegistry:
    """All workers of one optimizer that are remembered, to be used under the optimizer's lock.

    Args:
        name: The optimizer's, for messages.
        make_step_slot: Makes the step slot of a new one.
        room: Takes the buffers of those who are forgotten.
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
        # Those that may be alive: each step looks at these, and not at thousands that have been.
        self._living: dict[str, Worker] = {}
        self._newest_life = 0

    def __iter__(self) -> Iterator[Worker]:
        """All of them, as they are at the moment."""
        return iter(tuple(self._known.values()))

    @property
    def alive(self) -> list[Worker]:
        """Those whose leases hold."""
        living = [worker for worker in self._living.values() if worker.alive]
        if len(living) < len(self._living):
            self._living = {worker.name: worker for worker in living}
        return living

    def holds(self, worker: Worker) -> None:
        """A worker has begun a step, in the middle of which it is alive."""
        self._living[worker.name] = worker

    def too_few(self, needed: int) -> OptserveError:
        """The error for a step that takes more workers than are alive; says who is, and who has been."""
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
        """The least clock of those alive."""
        return min((worker.clock for worker in self.alive), default=default)

    def find(self, name: str) -> Worker | None:
        """One that is remembered, dead or alive."""
        return self._known.get(name)

    def get(self, name: str) -> Worker:
        """One that is alive, or raise WORKER_UNKNOWN."""
        worker = self._known.get(name)
        if worker is None or not worker.alive:
            raise OptserveError(
                Reason.WORKER_UNKNOWN,
                f"{name[:64]!r} is no worker of {self._name}, or its lease has run out; report it alive.",
                field="worker",
                worker=name[:64],
            )
        return worker

    def check_current(self, worker: Worker, stream: int | None, life: int) -> None:
        """Raise WORKER_REPLACED for an earlier life, STEP_TAKEN_OVER for a stream that this one has given up."""
        if life != worker.life:
            raise refusals.worker_replaced(self._name, worker.name)
        if stream is not None and stream < worker.stream:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER, f"Worker {worker.name!r} of {self._name} has opened another stream since."
            )

    def new_life(self, name: str) -> int:
        """A number for a life that may begin, greater than all that were given here or used under that name.

        It also grows from one start of the server to the next, as long as its clock does.
        """
        self._newest_life = max(self._newest_life + 1, self._clock.time_ns())
        worker = self._known.get(name)
        return max(self._newest_life, worker.life + 1) if worker else self._newest_life

    def claim(self, worker: Worker, life: int) -> bool:
        """Let a life act under a worker's name; gives whether that ends another one.

        Raises:
            OptserveError: WORKER_REPLACED.
        """
        if life == worker.life:
            return False
        # One without a number cannot be told from others of its kind, so it may come in when nobody is there.
        if life < worker.life and (life or worker.alive):
            raise refusals.worker_replaced(self._name, worker.name)
        worker.life = life
        return True

    def revive(self, name: str, lease_s: float, step: int) -> Worker:
        """Let one live for another `lease_s` seconds; if it comes anew, at the given step of the optimizer.

        Raises:
            OptserveError: SERVER_FULL.
        """
        worker = self._known.get(name) or self._remember(name)
        if not worker.alive:
            # It must not hold up the others until it has caught up, nor wait for one that is as new.
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
                    Reason.SERVER_FULL, f"{self._name} has {MAX_KNOWN} workers, which is all.", limit=MAX_KNOWN
                )
            oldest = min(dead, key=lambda worker: worker.seen_at)
            self._buffer_budget.take_back(oldest.step_slot)
            del self._known[oldest.name]
            self._living.pop(oldest.name, None)
        worker = self._known[name] = Worker(name, self._make_step_slot(), self._clock.monotonic)
        return worker

    def clear(self) -> None:
        """Forget all, and give their room back."""
        for worker in self:
            self._buffer_budget.take_back(worker.step_slot)
        self._known.clear()
        self._living.clear()

    # What outlives the process.

    def made_step(self, name: str, retained: Retained, clock: int) -> None:
        """A worker has made a step, in this life of the server or an earlier one, after which its clock stood there."""
        worker = self._known.get(name) or self._remember(name)
        worker.step_slot.retained, worker.clock, worker.seen_at = retained, clock, self._clock.monotonic()

    def to_json(self) -> dict[str, Any]:
        """What is known of all workers, as it is written down."""
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
    """The names of the first few."""
    names = ", ".join(repr(worker.name) for worker in workers[:MAX_NAMED])
    return names + (f" and {len(workers) - MAX_NAMED} more" if len(workers) > MAX_NAMED else "")
