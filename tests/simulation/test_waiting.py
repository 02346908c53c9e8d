"""Workers that wait for others, in virtual time: for whom, how long, and what they are told."""

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

import optserve
from simulation.scene import Scene, hosted, scene
from simulation.world import Task

SEEDS = range(20)

LATENCY_S = 0.5
"""More than the calls of a test take, as long as nobody waits for anybody."""


def gradient(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(4, float(value))}


def beside(there: Scene, act: Callable[[], object]) -> Task:
    """A thread of the client that acts now."""
    task = there.world.current
    assert task is not None
    return task.process.start(act, "beside")


def join(there: Scene, task: Task) -> None:
    if not task.ended:
        there.world.wait(task.joining, f"the end of {task.name}")


def enter(client: optserve.Client, worker: str) -> None:
    """Become alive, without a leave."""
    client.worker("a", worker).__enter__()


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_waits_for_a_worker_that_is_dead(tmp_path, seed):
    with scene(seed, tmp_path) as there:
        there.play(there.let("maker", lambda client: hosted(client, optserve.Bounded(0, lease_s=5.0))))
        dead = there.let("dead", lambda client: enter(client, "dead"))
        there.play(dead)
        dead.process.kill()

        def alive(client: optserve.Client) -> None:
            with client.worker("a", "alive") as worker:
                worker.pull()
                began = there.world.now
                for _ in range(3):
                    worker.step(gradient(-1), timeout_s=20)
                # The first step may be made at once: neither has made one. For the second its lease runs out first.
                assert 5.0 - 2 * LATENCY_S < there.world.now - began < 5.0 + LATENCY_S
                assert worker.current_step == 3

        there.play(there.let("alive", alive))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lease_runs_out_unless_it_is_renewed(tmp_path, seed):
    alive: list[tuple[float, int]] = []
    with scene(seed, tmp_path) as there:
        there.play(there.let("maker", lambda client: hosted(client, optserve.Async(lease_s=5.0))))
        dead = there.let("dead", lambda client: enter(client, "dead"))
        there.play(dead)
        dead.process.kill()
        ended = there.world.now

        def look(client: optserve.Client) -> None:
            with client.worker("a", "renewed"):
                while there.world.now < ended + 20.0:
                    there.world.sleep(0.5)
                    with client.worker("a", "looks") as looks:
                        alive.append((there.world.now - ended, looks.live_workers))

        there.play(there.let("renewed", look))
    # Itself, the one that is renewed, and the dead one as long as its lease holds.
    assert {count for seconds, count in alive if seconds < 5.0 - LATENCY_S} == {3}
    assert {count for seconds, count in alive if seconds > 5.0 + LATENCY_S} == {2}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_that_is_ahead_waits_until_the_slowest_has_stepped(tmp_path, seed):
    with scene(seed, tmp_path) as there:
        there.play(there.let("maker", lambda client: hosted(client, optserve.Bounded(1, lease_s=3600))))

        def both(client: optserve.Client) -> None:
            opt = client.optimizer("a")
            with client.worker("a", "fast") as fast, client.worker("a", "slow") as slow:
                for worker in (fast, slow):
                    worker.pull()
                fast.step(gradient(-1))
                fast.step(gradient(-1))
                with pytest.raises(optserve.DeadlineExceededError):
                    fast.step(gradient(-1), timeout_s=30)
                assert opt.pull_parameters().step == 2
                slow.step(gradient(-1))
                fast.step(gradient(-1), timeout_s=LATENCY_S)
                assert opt.pull_parameters().step == 4

        there.play(there.let("both", both))


@pytest.mark.parametrize("seed", SEEDS)
def test_with_too_few_workers_alive_a_step_is_made_when_another_comes(tmp_path, seed):
    with scene(seed, tmp_path) as there:
        there.play(there.let("maker", lambda client: hosted(client, optserve.Sync(2))))

        def one(client: optserve.Client) -> None:
            with client.worker("a", "one") as worker:
                worker.pull()
                two = there.let("two", lambda client: step_of_two(there, client))
                assert worker.step(gradient(-1))["w"].tolist() == [2] * 4
                join(there, two)

        there.play(there.let("one", one))


def step_of_two(there: Scene, client: optserve.Client) -> None:
    there.world.sleep(there.world.random.uniform(0, 10))
    with client.worker("a", "two") as worker:
        worker.pull()
        worker.step(gradient(-3))


def test_who_waits_alone_is_told_after_seconds_who_is_there(tmp_path, caplog):
    there_is = r"takes 2 workers, of which 1 are alive \('one'\)\. No longer alive: 'gone'\."
    raised: list[type[optserve.OptserveError]] = []

    def one(there: Scene, client: optserve.Client) -> None:
        with client.worker("a", "gone"):
            pass
        with client.worker("a", "one") as worker:
            worker.pull()
            # A deadline may fall into one of the tries, and then says nothing of the pauses between them.
            with pytest.raises((optserve.TooFewWorkersError, optserve.DeadlineExceededError)) as caught:
                worker.step(gradient(-1), timeout_s=3.5)
            raised.append(type(caught.value))
            if isinstance(caught.value, optserve.TooFewWorkersError):
                assert re.search(there_is, caught.value.message)
            told = [record.levelname for record in caplog.records if re.search(there_is, record.getMessage())]
            assert told == ["WARNING"]
            caplog.clear()
            # One that is there and slow is waited for, without a word.
            with client.worker("a", "slow"), pytest.raises(optserve.DeadlineExceededError):
                worker.step(gradient(-1), timeout_s=20)
            assert not caplog.records

    for seed in SEEDS:
        with scene(seed, tmp_path) as there:
            there.play(there.let("maker", lambda client: hosted(client, optserve.Sync(2, lease_s=60.0))))
            logging.disable(logging.NOTSET)
            there.play(there.let("one", partial(one, there)))
    assert raised.count(optserve.TooFewWorkersError) > len(SEEDS) // 2


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_leaving_the_block_interrupts_a_step_that_waits_and_takes_the_leave_at_once(tmp_path, seed, alone):
    raised: list[type[optserve.OptserveError]] = []

    def step(worker: optserve.Worker) -> None:
        try:
            worker.step(gradient(-1))
        except optserve.OptserveError as error:
            raised.append(type(error))

    with scene(seed, tmp_path) as there:
        there.play(there.let("maker", lambda client: hosted(client, optserve.Sync(2, lease_s=3600))))

        def leave(client: optserve.Client) -> None:
            began, steps = 0.0, list[Task]()
            with suppress(KeyboardInterrupt), client.worker("a", "w") as worker:
                worker.pull()
                steps = [beside(there, partial(step, worker)) for _ in range(3)]
                # On the way, in a commit that waits for another worker, or in a pause between two tries.
                there.world.sleep(there.world.random.choice((0.01, 0.1, 1.0, 20.0)))
                began = there.world.now
                # As when somebody presses Ctrl-C while this thread waits for the others.
                raise KeyboardInterrupt
            for task in steps:
                join(there, task)
            assert there.world.now - began < LATENCY_S
            with pytest.raises(optserve.ClientUseError, match="has left"):
                worker.step(gradient(-1))
            with client.worker("a", "looks") as looks:
                assert looks.live_workers == (1 if alone else 2)
            assert client.optimizer("a").pull_parameters().step == 0

        if not alone:
            there.play(there.let("other", lambda client: enter(client, "other")))
        there.play(there.let("leaves", leave))
    # One was under way, and two waited for their turns.
    assert set(raised) <= {optserve.StepCancelledError, optserve.ClientUseError}
    assert len(raised) == 3


def test_an_addition_to_a_silent_server_ends_at_its_time_out(tmp_path):
    with scene(0, tmp_path) as there:

        def add(client: optserve.Client) -> None:
            opt = client.create_optimizer("a", optserve.Sgd(), {"w": np.zeros(4)})
            there.silence()
            began = there.world.now
            with pytest.raises(optserve.DeadlineExceededError):
                opt.add_parameters({"v": np.zeros(4)}, timeout_s=1.0)
            assert there.world.now - began < 1.0 + LATENCY_S

        there.play(there.let("client", add))
