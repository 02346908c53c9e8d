"""Changes that come between two steps: they wait for the step under way, and later steps wait for them."""

import threading

import pytest

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import StepRequest


def test_without_a_step_a_change_comes_at_once(steps):
    with steps.change_queue.between_steps(0):
        pass
    steps.begin(StepRequest("one")).close()


def test_a_change_waits_for_the_end_of_a_step_and_the_next_step_for_the_end_of_the_change(steps):
    order, entered, go = list[str](), threading.Event(), threading.Event()
    under_way = steps.begin(StepRequest("one"))

    def change() -> None:
        with steps.change_queue.between_steps(30):
            order.append("change begins")
            entered.set()
            go.wait(30)
            order.append("change ends")

    def next_step() -> None:
        step = steps.begin(StepRequest("two"))
        order.append("step")
        step.close()

    changing, stepping = threading.Thread(target=change), threading.Thread(target=next_step)
    changing.start()
    assert not entered.wait(0.05)
    under_way.close()
    assert entered.wait(30)
    stepping.start()
    go.set()
    changing.join(30)
    stepping.join(30)
    assert order == ["change begins", "change ends", "step"]


def test_changes_come_in_their_order(steps):
    order, first_in, go = list[int](), threading.Event(), threading.Event()

    def change(number: int) -> None:
        with steps.change_queue.between_steps(30):
            order.append(number)
            if number == 0:
                first_in.set()
                go.wait(30)

    threads = [threading.Thread(target=change, args=(0,))]
    threads[0].start()
    first_in.wait(30)
    with pytest.raises(OptserveError) as error, steps.change_queue.between_steps(0.01):
        pass
    assert error.value.reason is Reason.STEP_IN_PROGRESS
    go.set()
    threads[0].join(30)
    change(1)
    assert order == [0, 1]


def test_the_wait_ends_at_its_time_and_steps_go_on(steps):
    under_way = steps.begin(StepRequest("one"))
    with pytest.raises(OptserveError) as error, steps.change_queue.between_steps(0.01):
        pass
    assert error.value.reason is Reason.STEP_IN_PROGRESS
    under_way.close()
    steps.begin(StepRequest("two")).close()


def test_a_step_for_which_a_change_waits_can_be_taken_over(steps):
    steps.begin(StepRequest("one"))
    entered = threading.Event()

    def change() -> None:
        with steps.change_queue.between_steps(30):
            entered.set()

    changing = threading.Thread(target=change)
    changing.start()
    again = steps.begin(StepRequest("one"))
    assert not entered.is_set()
    again.close()
    assert entered.wait(30)
    changing.join(30)
