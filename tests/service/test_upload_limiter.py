"""The upload limiter that the announced steps of workers pass."""

import threading
import time
from contextlib import ExitStack

import numpy as np

import optserve
from optserve_server.edge.gate.upload_limiter import UploadLimiter


def entering(upload_limiter: UploadLimiter, stream: str, order: list[str]) -> threading.Thread:
    """A thread that goes in; returns when it waits, or is in."""

    def enter() -> None:
        upload_limiter.enter(stream)
        order.append(stream)

    thread = threading.Thread(target=enter)
    waiting = len(upload_limiter._waiting)
    thread.start()
    while thread.is_alive() and len(upload_limiter._waiting) == waiting:
        time.sleep(0.0005)
    return thread


def test_they_go_in_in_the_order_in_which_they_came_and_no_more_than_may_be_inside():
    upload_limiter, order = UploadLimiter(2, slow_after_s=60), list[str]()
    threads = [entering(upload_limiter, stream, order) for stream in "abcdef"]
    assert order == ["a", "b"]
    for leaver, inside in (("b", "abc"), ("a", "abcd"), ("a", "abcd"), ("c", "abcde"), ("d", "abcdef")):
        upload_limiter.leave(leaver)
        threads[len(inside) - 1].join(10)
        assert order == list(inside)


def test_those_who_do_not_come_out_are_not_waited_for():
    upload_limiter, order = UploadLimiter(1, slow_after_s=0.02), list[str]()
    for thread in [entering(upload_limiter, stream, order) for stream in "abcdef"]:
        thread.join(10)
    assert order == list("abcdef")


def test_who_brings_nothing_is_not_waited_for_however_often_it_moves():
    """Empty chunks every 5 ms held the turn of all optimizers."""
    upload_limiter, over = UploadLimiter(1, slow_after_s=0.05), threading.Event()
    upload_limiter.enter("attacker")

    def attack() -> None:
        while not over.wait(0.002):
            upload_limiter.record_progress("attacker", 1)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        order: list[str] = []
        entering(upload_limiter, "other", order).join(10)
        assert order == ["other"]
    finally:
        over.set()
        attacker.join()


def test_who_brings_much_is_waited_for():
    upload_limiter, order = UploadLimiter(1, slow_after_s=1.0), list[str]()
    upload_limiter.enter("first")
    second = entering(upload_limiter, "second", order)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        upload_limiter.record_progress("first", 64 << 10)
        time.sleep(0.001)
    assert order == []
    upload_limiter.leave("first")
    second.join(10)
    assert order == ["second"]


def test_workers_that_stop_in_the_middle_of_a_step_hold_up_no_other(client, name):
    size = 100_000
    gradient = {"x": np.full(size, -1, np.float32), "y": np.full(size, -1, np.float32)}
    zero = {key: np.zeros_like(array) for key, array in gradient.items()}
    one = optserve.Sgd(learning_rate=1.0)
    opt = client.create_optimizer(name, one, zero, hosted=True, consistency=optserve.Async())
    with ExitStack() as stack, client.worker(name, "w", transport="grpc") as worker:
        worker.pull()
        steps = []
        for number in range(10):
            other = stack.enter_context(client.worker(name, f"stalled-{number}", transport="grpc"))
            other.pull()
            steps.append(stack.enter_context(other._optimizer.begin_step()))
            steps[-1].send("x", gradient["x"])
        for _ in range(20):
            worker.step(gradient, timeout_s=10)
        assert opt.pull_parameters().step == 20
        for step in steps:
            step.send("y", gradient["y"])
        stack.close()
        assert np.all(opt.pull_parameters().arrays["x"] == 30)
