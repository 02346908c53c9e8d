"""Lives of one worker: one after the other may bear a name, and only the last one makes steps."""

import threading
from contextlib import closing

import numpy as np
import pytest

from clocks import StoppedClock, TellingClock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import Reply, StepRequest
from transaction.harness import F4, write_shared
from transaction.test_workers import ONES, shared_by, x_of


def refused(reason: Reason):
    return pytest.raises(OptserveError, check=lambda error: error.reason is reason)


def enter(steps: Steps, worker: str = "w") -> int:
    """Begin a life as a client does; gives its number."""
    life = steps.workers.report(worker, leaving=False).life
    assert steps.workers.report(worker, leaving=False, life=life).life == life
    return life


def make(steps: Steps, request_id: str, life: int, worker: str = "w", **options) -> int:
    with closing(
        steps.begin(StepRequest(request_id, reply=Reply.NOTHING, worker=worker, life=life, **options))
    ) as step:
        step.stage(0, 0, ONES)
        return step.commit().step


def test_a_life_that_begins_ends_those_before_it():
    steps = shared_by("async")
    first = enter(steps)
    steps.last("w", 1, first)
    assert make(steps, "a", first, stream=1) == 1
    second = enter(steps)
    assert second > first
    for attempt in (
        lambda: make(steps, "b", first, stream=1),
        # By a unary call.
        lambda: make(steps, "b", first),
        lambda: steps.last("w", 2, first),
        lambda: steps.workers.report("w", leaving=False, life=first),
        lambda: steps.workers.report("w", leaving=True, life=first),
        lambda: steps.workers.pulled("w", 1, first),
    ):
        with refused(Reason.WORKER_REPLACED):
            attempt()
    assert make(steps, "c", second) == 2
    assert x_of(steps) == [-1, -1]


def test_a_number_that_nobody_uses_ends_nothing():
    steps = shared_by("async")
    life = enter(steps)
    # A first report that arrives twice, or late.
    unused = steps.workers.report("w", leaving=False).life
    assert make(steps, "a", life) == 1
    assert make(steps, "b", unused) == 2
    with refused(Reason.WORKER_REPLACED):
        make(steps, "c", life)


def test_what_a_life_has_under_way_is_not_made_once_the_next_has_begun():
    steps = shared_by("async")
    first = enter(steps)
    step = steps.begin(StepRequest("a", worker="w", life=first))
    step.stage(0, 0, ONES)
    second = enter(steps)
    with refused(Reason.WORKER_REPLACED):
        step.commit()
    # Nor is it waited for.
    assert make(steps, "b", second) == 1
    step.close()
    assert make(steps, "c", second) == 2


def test_gradients_of_a_life_before_are_not_taken_from_its_memory():
    steps = shared_by("async")
    first = enter(steps)
    segment = steps.share()
    assert segment is not None
    with closing(steps.begin(StepRequest("a", segment=segment, worker="w", life=first))) as step:
        write_shared(segment, np.full(2, 5, F4))
        enter(steps)
        with refused(Reason.WORKER_REPLACED):
            step.commit()
    assert x_of(steps) == [1, 1]


@pytest.mark.parametrize("kind", ["sync", "bounded"])
def test_a_step_that_waits_is_refused_when_the_next_life_begins_and_does_not_count(kind):
    clock, refusals = TellingClock(), []
    steps = shared_by(kind, "a", "b", clock=clock)
    first = enter(steps, "a")
    if kind == "bounded":
        make(steps, "before", first, "a")

    def give() -> None:
        try:
            make(steps, "given", first, "a")
        except OptserveError as error:
            refusals.append(error.reason)

    thread = threading.Thread(target=give, daemon=True)
    thread.start()
    assert clock.somebody_waits.wait(30)
    before = steps.step
    enter(steps, "a")
    thread.join(30)
    assert refusals == [Reason.WORKER_REPLACED]
    assert steps.step == before
    assert steps.workers.registry.get("a").contribution is None


def test_a_life_that_has_left_is_not_brought_back_by_its_own_late_report():
    steps = shared_by("async")
    life = enter(steps)
    steps.workers.report("w", leaving=True, life=life)
    with refused(Reason.WORKER_REPLACED):
        steps.workers.report("w", leaving=False, life=life)
    assert steps.workers.registry.alive == []
    assert make(steps, "a", enter(steps)) == 1


def test_a_life_whose_lease_has_run_out_is_over_when_another_has_begun_and_else_goes_on():
    clock = StoppedClock()
    steps = shared_by("async", clock=clock)
    first = enter(steps)
    clock.seconds += 3600
    with refused(Reason.WORKER_UNKNOWN):
        make(steps, "a", first)
    steps.workers.report("w", leaving=False, life=first)
    assert make(steps, "a", first) == 1
    second = enter(steps)
    clock.seconds += 3600
    with refused(Reason.WORKER_REPLACED):
        steps.workers.report("w", leaving=False, life=first)
    steps.workers.report("w", leaving=False, life=second)
    assert make(steps, "b", second) == 2


def test_the_lives_are_in_the_same_order_after_a_restart_whoever_comes_first():
    before = shared_by("async")
    first, second = enter(before), enter(before)
    after = shared_by("async")
    assert after.workers.report("w", leaving=False).life > second
    after.workers.report("w", leaving=False, life=first)
    assert make(after, "a", first) == 1
    after.workers.report("w", leaving=False, life=second)
    assert make(after, "b", second) == 2
    with refused(Reason.WORKER_REPLACED):
        make(after, "c", first)


def test_a_client_without_numbers_goes_on_as_before_but_not_beside_a_life_that_has_one():
    steps = shared_by("async", "w")
    assert make(steps, "step-1", 0) == 1
    life = enter(steps)
    # It reports as if nothing had happened, which ends nobody and keeps nobody alive.
    lease_until = steps.workers.registry.get("w").lease_until
    steps.workers.report("w", leaving=False)
    assert steps.workers.registry.get("w").lease_until == lease_until
    for attempt in (lambda: make(steps, "step-2", 0), lambda: steps.workers.report("w", leaving=True)):
        with refused(Reason.WORKER_REPLACED):
            attempt()
    steps.workers.report("w", leaving=True, life=life)
    steps.workers.report("w", leaving=False)
    assert make(steps, "step-2", 0) == 2


def test_a_unary_call_can_say_after_which_step_it_comes():
    steps = shared_by("async")
    life = enter(steps)
    assert make(steps, "a", life, last_request_id="") == 1
    assert make(steps, "b", life, last_request_id="a") == 2
    # The same once more, and what was given up before and comes late.
    with closing(
        steps.begin(StepRequest("b", reply=Reply.NOTHING, worker="w", life=life, last_request_id="a"))
    ) as again:
        assert again.commit().replayed
    with refused(Reason.WRONG_STEP):
        make(steps, "late", life, last_request_id="a")
    assert steps.step == 2
