"""Workers on one optimizer, without a server: what happens between two looks of one that waits."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from clocks import TellingClock
from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.durability import InMemory
from optserve_server.engine.records import Change, UpdateRecord
from optserve_server.engine.step_record import StepRecord
from optserve_server.engine.step_slot import StepSlot
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import Reply, Step, StepRequest
from optserve_server.numerics import backends
from optserve_server.numerics.consistency import CONSISTENCIES, AsyncConsistency, Consistency, SyncConsistency
from optserve_server.numerics.layout import Layout, Operand, Parameter
from optserve_server.numerics.rules import Sgd
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from transaction.harness import F4, run_step, write_shared

ONES = np.ones(2, np.float32).tobytes()


def make_step(steps: Steps, worker: str) -> int:
    """A whole step of a worker; gives its number."""
    step = steps.begin(StepRequest(str(uuid.uuid4()), reply=Reply.NOTHING, worker=worker))
    try:
        step.stage(0, 0, ONES)
        return step.commit().step
    finally:
        step.close()


def shared_by(kind: str, *workers: str, clock: Clock = SYSTEM) -> Steps:
    """An optimizer that these workers share, and a step of which takes all of them if they are in step."""
    consistency = SyncConsistency(workers=len(workers)) if kind == "sync" else CONSISTENCIES[kind]()
    settings = Settings(Sgd(learning_rate=1.0), hosted=True, consistency=consistency)
    state = State(Layout((Parameter("x", (2,), F4),)), settings, backends.load("numpy", 1))
    steps = Steps("test", state, InMemory(), clock=clock)
    with closing(steps.begin_placement("upload")) as upload:
        upload.stage(0, 0, ONES, Operand.PARAMETER)
        upload.commit()
    for worker in workers:
        steps.workers.report(worker, leaving=False)
    return steps


def x_of(steps: Steps) -> list[float]:
    with steps.locked_state() as state:
        return state.parameters[F4][:2].tolist()


def test_a_replay_whose_reply_has_gone_meanwhile_applies_nothing_from_shared_memory():
    steps = shared_by("async", "w")
    segment = steps.share()
    assert segment is not None
    write_shared(segment, np.ones(2, F4))
    with closing(steps.begin(StepRequest("a", segment=segment, worker="w"))) as step:
        step.commit()
    with closing(steps.begin(StepRequest("a", segment=segment, worker="w"))) as replay:
        steps.workers.forget_replies()
        with pytest.raises(OptserveError, check=lambda error: error.reason is Reason.MISSING_CHUNK):
            replay.commit()
    assert steps.step == 1


@pytest.mark.parametrize("reply", [Reply.UPDATES, Reply.PARAMETERS, Reply.NOTHING])
def test_what_lies_in_shared_memory_is_a_workers_gradient_once(reply):
    steps = shared_by("async", "w")
    segment = steps.share()
    assert segment is not None
    write_shared(segment, np.ones(2, F4))
    with closing(steps.begin(StepRequest("a", segment=segment, worker="w", reply=reply))) as step:
        step.commit()
    before = x_of(steps)
    with (
        closing(steps.begin(StepRequest("b", segment=segment, worker="w", reply=reply))) as step,
        pytest.raises(OptserveError, check=lambda error: error.reason is Reason.MISSING_CHUNK),
    ):
        step.commit()
    assert x_of(steps) == before


@pytest.mark.parametrize("kind", ["sync", "bounded"])
def test_a_step_does_not_look_at_thousands_of_workers_that_have_been(kind):
    def best_s(steps: Steps) -> float:
        took = []
        for _ in range(30):
            begun = time.perf_counter()
            with closing(steps.begin(StepRequest(str(uuid.uuid4()), reply=Reply.PARAMETERS, worker="w"))) as step:
                step.stage(0, 0, ONES)
                step.commit()
            took.append(time.perf_counter() - begun)
        return min(took)

    alone, crowded = shared_by(kind, "w"), shared_by(kind, "w")
    for number in range(4000):
        life = crowded.workers.report(f"gone-{number}", leaving=False).life
        crowded.workers.report(f"gone-{number}", leaving=True, life=life)
    assert best_s(crowded) < 4 * best_s(alone)


def is_taken_over(error: OptserveError) -> bool:
    return error.reason is Reason.STEP_TAKEN_OVER


def test_a_stream_that_was_given_up_begins_nothing_and_disturbs_nothing():
    steps = shared_by("async", "w")
    steps.last("w", stream=1)
    with closing(steps.begin(StepRequest("step-1", worker="w", stream=1))) as step:
        step.stage(0, 0, ONES)
        step.commit()
    steps.last("w", stream=2)
    with pytest.raises(OptserveError, check=is_taken_over):
        steps.begin(StepRequest("step-2", worker="w", stream=1))
    # The reply of the last step is still there.
    with closing(steps.begin(StepRequest("step-1", worker="w", stream=2))) as replay:
        assert replay.commit().replayed
        assert [np.frombuffer(part.data, F4).tolist() for part in replay.reply(1 << 20, lambda part: part)] == [
            [-1, -1]
        ]
    with closing(steps.begin(StepRequest("step-2", worker="w", stream=2))) as step:
        # The same step with another gradient, whose caller has been told that it has failed.
        with pytest.raises(OptserveError, check=is_taken_over):
            steps.begin(StepRequest("step-2", worker="w", stream=1))
        step.stage(0, 0, ONES)
        assert step.commit().step == 2


def test_what_a_given_up_stream_had_begun_is_not_applied_and_gives_way_at_once():
    steps = shared_by("async", "w")
    steps.last("w", stream=1)
    abandoned = steps.begin(StepRequest("step-1", worker="w", stream=1))
    abandoned.stage(0, 0, ONES)
    steps.last("w", stream=2)
    with pytest.raises(OptserveError, check=is_taken_over):
        abandoned.commit()
    # Under another name, so not taken over for being the same.
    with closing(steps.begin(StepRequest("another", worker="w", stream=2))) as step:
        with pytest.raises(OptserveError, check=is_taken_over):
            abandoned.stage(0, 0, ONES)
        abandoned.close()
        step.stage(0, 0, ONES)
        assert step.commit().step == 1


def test_shared_gradients_of_a_given_up_stream_leave_the_reply_alone():
    steps = shared_by("async", "w")
    segment = steps.share()
    assert segment is not None
    steps.last("w", stream=1)
    abandoned = steps.begin(StepRequest("step-1", segment=segment, worker="w", stream=1))
    steps.last("w", stream=2)
    assert isinstance(abandoned._holder, StepSlot)
    before = abandoned._holder.staging.updates[F4].copy()
    write_shared(segment, np.full(2, 5, F4))
    with pytest.raises(OptserveError, check=is_taken_over):
        abandoned.commit()
    assert np.array_equal(steps.workers.registry.get("w").step_slot.staging.updates[F4], before)


def test_a_gradient_that_waits_in_a_given_up_stream_does_not_count():
    clock, refused = TellingClock(), []
    steps = shared_by("sync", "a", "b", clock=clock)

    def give(worker: str, value: int, stream: int) -> None:
        with closing(steps.begin(StepRequest("step-1", reply=Reply.NOTHING, worker=worker, stream=stream))) as step:
            step.stage(0, 0, (value * np.ones(2, np.float32)).tobytes())
            try:
                step.commit()
            except OptserveError as error:
                refused.append(error.reason)

    steps.last("a", stream=1)
    thread = threading.Thread(target=give, args=("a", 100, 1), daemon=True)
    thread.start()
    assert clock.somebody_waits.wait(30)
    steps.last("a", stream=2)
    # From now on, and not from when the one that waits has noticed.
    assert steps.workers.registry.get("a").contribution is None
    thread.join(30)
    assert refused == [Reason.STEP_TAKEN_OVER]
    others = threading.Thread(target=give, args=("b", 3, 3), daemon=True)
    others.start()
    give("a", 1, 2)
    others.join(30)
    with steps.locked_state() as state:
        assert (steps.step, state.parameters[F4][:2].tolist()) == (1, [-1, -1])


def share_by(steps: Steps, consistency: Consistency | None) -> None:
    """Let other workers share an optimizer, or none."""
    settings = replace(steps._state.settings, consistency=consistency)
    steps.update(UpdateRecord("test", settings, "etag", datetime.now(UTC)))


def test_settings_that_are_refused_discard_no_step_though_it_is_idle():
    state = State(Layout((Parameter("x", (2,), F4),)), Settings(Sgd(learning_rate=1.0)), backends.load("numpy", 1))
    steps = Steps("test", state, InMemory(), idle_step_s=0.0)
    # Workers need parameters that the server holds.
    impossible = replace(state.settings, consistency=AsyncConsistency())
    with closing(steps.begin(StepRequest("idle"))) as step:
        step.stage(0, 0, ONES)
        with pytest.raises(OptserveError) as refused:
            steps.update(UpdateRecord("test", impossible, "etag", datetime.now(UTC)))
        assert refused.value.reason is Reason.INVALID_FIELD
        assert step.commit().step == 1


def test_workers_do_not_come_into_the_middle_of_a_clients_step():
    steps = shared_by("async")
    share_by(steps, None)
    with closing(steps.begin(StepRequest("mine"))) as step:
        step.stage(0, 0, ONES)
        with pytest.raises(OptserveError) as refused:
            share_by(steps, SyncConsistency(workers=1))
        assert refused.value.reason is Reason.STEP_IN_PROGRESS
        step.commit()
        assert x_of(steps) == [0, 0]
        # Its reply is still to be read out of the buffer that the mean would go to.
        with pytest.raises(OptserveError):
            share_by(steps, SyncConsistency(workers=1))
    share_by(steps, SyncConsistency(workers=1))
    steps.workers.report("w", leaving=False)
    make_step(steps, "w")
    assert x_of(steps) == [-1, -1]


def test_a_mean_that_is_refused_takes_the_place_of_a_clients_last_reply():
    steps = shared_by("async")
    share_by(steps, None)
    run_step(steps, "mine", [(0, 0, ONES)])
    assert run_step(steps, "mine", []) == (-np.ones(2, F4)).tobytes()
    share_by(steps, SyncConsistency(workers=1))
    steps.workers.report("w", leaving=False)
    steps._state.write(F4, 0, 0, np.full(2, -3e38, F4))
    with closing(steps.begin(StepRequest("w", reply=Reply.NOTHING, worker="w"))) as step:
        step.stage(0, 0, np.full(2, 1e38, F4).tobytes())
        with pytest.raises(OptserveError, match="would be -inf"):
            step.commit()
    steps.workers.report("w", leaving=True)
    share_by(steps, None)
    with pytest.raises(OptserveError) as gone:
        run_step(steps, "mine", [])
    assert gone.value.reason is Reason.REPLY_GONE


def test_a_client_that_goes_while_its_step_waits_is_said_to_have_gone():
    steps = shared_by("sync", "v", "w")
    step = steps.begin(StepRequest("step-1", worker="w", stream=1))
    step.stage(0, 0, ONES)
    step.abandoned = True
    with pytest.raises(OptserveError, match="client of worker 'w' has gone") as refused:
        step.commit()
    assert refused.value.reason is Reason.CLIENT_GONE
    step.close()
    # The gradient does not count.
    assert steps.step == 0


class Refusing(InMemory):
    """Refuses the step that it is told to refuse."""

    reads_staging = True

    def __init__(self) -> None:
        self.refuses = False

    def write(self, record: Change) -> int:
        if isinstance(record, StepRecord) and self.refuses:
            self.refuses = False
            raise OptserveError(Reason.NOT_DURABLE, "The disk is full.")
        return 0


class HandedOn:
    """A lock that another thread gets whenever it is let go: calls something between a release and the next line."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = 0
        self.on_release: Callable[[], object] | None = None
        self.is_waited_on = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        self._held += taken
        return taken

    def release(self) -> None:
        self._held -= 1
        is_free = self._held == 0
        self._lock.release()
        if is_free and self.on_release is not None:
            self.on_release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    # What a condition asks of its lock.

    def _is_owned(self) -> bool:
        return self._held > 0

    def _release_save(self) -> int:
        held, self._held = self._held, 0
        for _ in range(held):
            self._lock.release()
        self.is_waited_on.set()
        return held

    def _acquire_restore(self, held: int) -> None:
        for _ in range(held):
            self._lock.acquire()
        self._held = held


class HandingOn(Clock):
    """A clock whose first lock, which is that of an optimizer's steps, is handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.lock_of_steps: HandedOn | None = None

    def rlock(self) -> Any:
        if self.lock_of_steps is None:
            self.lock_of_steps = HandedOn()
            return self.lock_of_steps
        return super().rlock()


def test_a_worker_that_is_about_to_wait_does_not_miss_what_it_would_wait_for():
    clock = HandingOn()
    steps = shared_by("bounded", "fast", "slow", clock=clock)
    lock = clock.lock_of_steps
    assert lock is not None
    make_step(steps, "fast")
    fast = steps.workers.registry.get("fast")

    def step_of_slow() -> None:
        # The last moment before it waits: its gradient is there, and it has let go of the lock to look for others.
        if fast.contribution is not None:
            lock.on_release = None
            make_step(steps, "slow")

    lock.on_release = step_of_slow
    assert make_step(steps, "fast") == 3
    assert lock.on_release is None
    assert not lock.is_waited_on.is_set()


def test_a_gradient_that_the_disk_has_refused_is_in_no_other_workers_step():
    consistency = SyncConsistency(workers=2)
    settings = Settings(Sgd(learning_rate=1.0), hosted=True, consistency=consistency)
    state = State(Layout((Parameter("x", (2,), F4),)), settings, backends.load("numpy", 1))
    durability, clock = Refusing(), HandingOn()
    steps = Steps("test", state, durability, clock=clock)
    with closing(steps.begin_placement("upload")) as upload:
        upload.stage(0, 0, ONES, Operand.PARAMETER)
        upload.commit()
    lives = {worker: steps.workers.report(worker, leaving=False).life for worker in "vwx"}

    def begun(worker: str, value: float) -> Step:
        step = steps.begin(StepRequest(f"step of {worker}", reply=Reply.NOTHING, worker=worker, life=lives[worker]))
        step.stage(0, 0, np.full(2, value, np.float32).tobytes())
        return step

    with ThreadPoolExecutor(2) as threads, closing(begun("v", 1)) as v, closing(begun("w", 100)) as w:
        waiting = threads.submit(v.commit)
        lock = clock.lock_of_steps
        assert lock is not None
        assert lock.is_waited_on.wait(10)
        with closing(begun("x", 3)) as x:
            durability.refuses = True

            def come() -> None:
                # At the first moment at which another commit can come after the disk has refused that of w.
                if not durability.refuses:
                    lock.on_release = None
                    threads.submit(x.commit).result(10)

            lock.on_release = come
            with pytest.raises(OptserveError, match="The disk is full"):
                w.commit()
            assert waiting.result(10).step == 1
    # 1 less the mean of 1 and 3; with that of w it was more.
    np.testing.assert_array_equal(state.parameters[F4], np.full(2, 1 - 2, np.float32))
