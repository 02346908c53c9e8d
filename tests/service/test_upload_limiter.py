"""The upload limiter that the announced steps of workers pass; what it does by itself, in virtual time."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest

import optserve
from optserve_server.edge.gate.upload_limiter import PROGRESS_BYTES, UploadLimiter
from simulation.clock import VirtualClock
from simulation.world import Hang, World

LIMIT_S = 600.0


class Gate:
    """An upload limiter, and streams that come in.

    Attributes:
        order: The streams that have been admitted.
    """

    def __init__(self, seed: int, limit: int, slow_after_s: float) -> None:
        self.world = World(seed)
        self._process = self.world.process("server")
        self.limiter = UploadLimiter(limit, slow_after_s, VirtualClock(self._process))
        self.order: list[str] = []

    def let(self, act: Callable[[], object]) -> None:
        self._process.start(act, "stream")

    def come(self, streams: str) -> None:
        """Let streams come, one after the other."""

        def enter(stream: str, moment: float) -> None:
            self.world.sleep(moment)
            self.limiter.enter(stream)
            self.order.append(stream)

        for number, stream in enumerate(streams):
            self.let(partial(enter, stream, 0.001 * number))

    def play(self, streams: str) -> None:
        """Until these streams have been admitted, in this order."""
        self.world.run(lambda: len(self.order) >= len(streams), LIMIT_S)
        assert self.order == list(streams)


@pytest.mark.parametrize("seed", range(10))
def test_they_go_in_in_the_order_in_which_they_came_and_no_more_than_may_be_inside(seed):
    gate = Gate(seed, limit=2, slow_after_s=2 * LIMIT_S)
    gate.come("abcdef")
    with pytest.raises(Hang):
        gate.play("abc")
    for leaver, inside in (("b", "abc"), ("a", "abcd"), ("a", "abcd"), ("c", "abcde"), ("d", "abcdef")):
        gate.let(partial(gate.limiter.leave, leaver))
        gate.play(inside)
    assert gate.world.now <= LIMIT_S


@pytest.mark.parametrize("seed", range(10))
def test_those_who_do_not_come_out_are_not_waited_for(seed):
    gate = Gate(seed, limit=1, slow_after_s=0.02)
    gate.come("abcdef")
    gate.play("abcdef")
    assert gate.world.now < 5 * 2 * 0.02 + 0.02


@pytest.mark.parametrize("seed", range(10))
def test_who_brings_nothing_is_not_waited_for_however_often_it_moves(seed):
    """Empty chunks every 5 ms held the turn of all optimizers."""
    gate = Gate(seed, limit=1, slow_after_s=0.05)

    def attack() -> None:
        gate.limiter.enter("attacker")
        while not gate.order:
            gate.limiter.record_progress("attacker", 1)
            gate.world.sleep(0.002)

    gate.let(attack)
    gate.world.run(lambda: gate.world.now > 0.001, LIMIT_S)
    gate.come("o")
    gate.play("o")
    assert gate.world.now < 3 * 0.05


@pytest.mark.parametrize("seed", range(10))
def test_who_brings_much_is_waited_for(seed):
    gate = Gate(seed, limit=1, slow_after_s=1.0)

    def bring() -> None:
        gate.limiter.enter("first")
        while gate.world.now < 60:
            gate.limiter.record_progress("first", PROGRESS_BYTES)
            gate.world.sleep(0.5)
        gate.order.append("first")
        gate.limiter.leave("first")

    gate.let(bring)
    gate.world.run(lambda: gate.world.now > 0.001, LIMIT_S)
    gate.come("s")
    gate.world.run(lambda: len(gate.order) == 2, LIMIT_S)
    assert gate.order == ["first", "s"]


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
