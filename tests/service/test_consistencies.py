"""What async, bounded and sync do with the gradients of several workers."""

import json
import random
import threading
from contextlib import ExitStack

import numpy as np
import pytest

import optserve
from optserve_server.persistence.journal import Reader
from service.worker_harness import MODEL, config_of, full, over_both_transports, run_all, shared

client = over_both_transports


def order_in(folder) -> list[list[str]]:
    """The workers of each step, as the journal has them."""
    records = [json.loads(record.meta) for record in Reader(folder, 0)]
    return [[worker for worker, *_ in record["workers"]] for record in records if record.get("workers")]


def test_async_workers_lose_and_double_nothing(client, name):
    opt = shared(client, name, optserve.Async())

    def work(number: int) -> None:
        with client.worker(name, f"w{number}") as worker:
            worker.pull()
            for step in range(25):
                worker.step(full(-(number + step)), reply=("parameters", "updates", "nothing")[step % 3])
            assert worker.steps_made == 25

    run_all(lambda number=number: work(number) for number in range(8))
    found = opt.pull_parameters()
    total = sum(number + step for number in range(8) for step in range(25))
    assert found.step == 200
    assert all(np.all(array == total) for array in found.arrays.values())


def test_staleness_is_told_and_can_scale(client, name):
    shared(client, name, optserve.Async(scale_by_staleness=True))
    with client.worker(name, "fast") as fast, client.worker(name, "slow") as slow:
        fast.pull()
        slow.pull()
        for _ in range(3):
            fast.step(full(-1))
            assert fast.staleness == 0
        assert slow.step(full(-8), reply="updates")["b"].tolist() == [2, 2, 2]
        assert slow.staleness == 3


def test_staleness_scales_the_update_and_not_the_gradient_and_a_killed_server_knows(tmp_path):
    def stale(client: optserve.Client, scaled: bool) -> tuple[dict, list]:
        opt = shared(client, "a", optserve.Async(scale_by_staleness=scaled), optserve.Adadelta())
        with client.worker("a", "fast") as fast, client.worker("a", "slow") as slow:
            fast.pull()
            slow.pull()
            for _ in range(3):
                fast.step(full(0.5))
            update = slow.step(full(2), reply="updates")
        state = opt.export_state()
        return update, [state.slots[key][slot] for key in MODEL for slot in ("square_avg", "acc_delta")]

    with optserve.local_server() as server, optserve.connect(server.target) as client:
        plain, plain_slots = stale(client, scaled=False)
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        update, slots = stale(client, scaled=True)
        assert all(np.array_equal(update[key], plain[key] / 4) for key in MODEL)
        assert all(np.array_equal(*pair) for pair in zip(slots, plain_slots, strict=True))
        before = client.optimizer("a").pull_parameters().arrays
        server.process.kill()
        server.process.wait()
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        after = client.optimizer("a").pull_parameters().arrays
        assert all(np.array_equal(after[key], before[key]) for key in MODEL)


def test_a_rule_without_a_learning_rate_cannot_be_scaled(client, name):
    with pytest.raises(optserve.InvalidArgumentError, match="no learning rate") as caught:
        shared(client, name, optserve.Async(scale_by_staleness=True), optserve.Vsgd())
    assert caught.value.field == "optimizer.consistency.scale_by_staleness"


@pytest.mark.parametrize("algorithm", [optserve.Adadelta(), optserve.Momentum()], ids=["adadelta", "momentum"])
def test_sync_is_one_worker_with_the_mean_whatever_the_order_of_arrival(client, name, algorithm):
    count, steps = 5, 8
    rng = np.random.default_rng(7)
    given = [
        [{key: rng.standard_normal(x.shape).astype(x.dtype) for key, x in MODEL.items()} for _ in range(count)]
        for _ in range(steps)
    ]
    alone = client.create_optimizer(f"{name}-alone", algorithm, MODEL, hosted=True)
    for grads in given:
        mean = {}
        for key in MODEL:
            total = grads[0][key].copy()
            for other in grads[1:]:
                total += other[key]
            mean[key] = total / total.dtype.type(count)
        alone.step(mean)
    expected = alone.pull_parameters().arrays
    together = shared(client, name, optserve.Sync(count), algorithm)
    turns = [random.Random(step).sample(range(count), count) for step in range(steps)]
    arrived = [[threading.Event() for _ in range(count + 1)] for _ in range(steps)]

    def work(number: int) -> None:
        with client.worker(name, f"w{number}") as worker:
            x = worker.pull().arrays
            for step in range(steps):
                place = turns[step].index(number)
                assert arrived[step][place].wait(30) or place == 0
                arrived[step][place + 1].set()
                x = worker.step(given[step][number])
                assert worker.current_step == step + 1
                assert worker.staleness == 0
        assert all(x[key].tobytes() == expected[key].tobytes() for key in x)

    for events in arrived:
        events[0].set()
    run_all(lambda number=number: work(number) for number in range(count))
    found = together.pull_parameters()
    assert found.step == steps
    assert all(found.arrays[key].tobytes() == expected[key].tobytes() for key in expected)


def test_of_the_backup_workers_the_late_ones_are_told(client, name):
    shared(client, name, optserve.Sync(workers=2, backup_workers=1))
    with ExitStack() as stack:
        first, second, late = (stack.enter_context(client.worker(name, who)) for who in ("a", "b", "c"))
        for worker in (first, second, late):
            worker.pull()
        run_all([lambda: first.step(full(-1)), lambda: second.step(full(-3))])
        with pytest.raises(optserve.GradientLateError, match=r"taken at step 0; .* is at step 1"):
            late.step(full(-100))
        assert np.all(late.pull().arrays["b"] == 2)
        run_all([lambda: first.step(full(-1)), lambda: late.step(full(-1))])
        assert late.steps_made == 1
        assert late.pull().step == 2


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_worker_is_further_ahead_than_the_bound(tmp_path, bound):
    count, steps = 5, 30
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        shared(client, "a", optserve.Bounded(bound))
        ready, led = threading.Barrier(count, timeout=60), threading.Barrier(count, timeout=60)

        def work(number: int) -> None:
            with client.worker("a", f"w{number}") as worker:
                worker.pull()
                ready.wait()
                if number == 0:
                    # The others go as far ahead of this one as they may.
                    led.wait()
                for step in range(steps):
                    worker.step(full(-1))
                    if number and step == bound:
                        led.wait()
                # Who leaves holds nobody up, so the bound ends here.
                ready.wait()

        run_all(lambda number=number: work(number) for number in range(count))
        server.process.kill()
        server.process.wait()
    clocks = {f"w{number}": 0 for number in range(count)}
    ahead = []
    for (worker,) in order_in(tmp_path):
        ahead.append(clocks[worker] - min(clocks.values()))
        clocks[worker] += 1
    assert len(ahead) == count * steps
    assert max(ahead) == bound


@pytest.mark.parametrize(
    ("consistency", "field"),
    [
        (optserve.Sync(0), "optimizer.consistency.sync.workers"),
        (optserve.Sync(5000), "optimizer.consistency.sync.workers"),
        (optserve.Async(lease_s=0.5), "optimizer.consistency.lease"),
        (optserve.Async(lease_s=7200), "optimizer.consistency.lease"),
    ],
)
def test_an_impossible_consistency_is_refused(client, name, consistency, field):
    with pytest.raises(optserve.InvalidArgumentError) as caught:
        shared(client, name, consistency)
    assert caught.value.field == field


def test_workers_need_parameters_that_the_server_holds(client, name):
    with pytest.raises(optserve.InvalidArgumentError, match="hosted mode"):
        client.create_optimizer(name, optserve.Sgd(), MODEL, consistency=optserve.Async())


def test_the_consistency_changes_when_nobody_is_there(client, name):
    opt = shared(client, name, optserve.Async(lease_s=5))
    assert opt.consistency == optserve.Async(lease_s=5)
    with client.worker(name), pytest.raises(optserve.FailedPreconditionError, match="1 workers are alive"):
        opt.update(consistency=optserve.Sync(2))
    opt.update(consistency=optserve.Sync(2, backup_workers=1))
    assert opt.consistency == optserve.Sync(2, backup_workers=1)
    opt.update(consistency=None)
    opt.refresh()
    opt.step(full(-1))


def test_more_workers_than_there_are_streams_are_refused(tmp_path):
    with (
        optserve.local_server(options=config_of(tmp_path, max_streams=4)) as server,
        optserve.connect(server.target) as client,
        pytest.raises(optserve.InvalidArgumentError, match="3 workers and 1 more cannot be connected"),
    ):
        shared(client, "a", optserve.Sync(3, backup_workers=1))
