"""Several workers on one optimizer: who may step, who waits, and what becomes of those who are gone."""

import itertools
import json
import os
import random
import re
import signal
import threading
import time
from contextlib import ExitStack, suppress

import grpc
import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

import optserve
from optserve.v1 import optimizer_pb2, replicas_pb2, service_pb2, service_pb2_grpc, steps_pb2
from optserve_server.persistence.journal import Reader
from service.wire_client import begin, chunk, commit, create, details, refused, stream
from service.worker_harness import HOSTED, MODEL, X, config_of, full, place, report, run_all, shared

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module", params=["grpc", "shm"])
def client(server, request):
    """Workers come over both transports; the tests that make streams by hand, over gRPC."""
    with optserve.connect(server.target, optserve.ClientConfig(transport=request.param)) as connected:
        yield connected


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


def test_a_worker_that_is_ahead_waits_until_the_slowest_has_stepped(client, name):
    opt = shared(client, name, optserve.Bounded(1))
    with client.worker(name, "fast") as fast, client.worker(name, "slow") as slow:
        for worker in (fast, slow):
            worker.pull()
        fast.step(full(-1))
        fast.step(full(-1))
        with pytest.raises(optserve.DeadlineExceededError):
            fast.step(full(-1), timeout_s=0.3)
        assert opt.pull_parameters().step == 2
        slow.step(full(-1))
        fast.step(full(-1))
        assert opt.pull_parameters().step == 4


def test_nobody_waits_for_a_worker_that_is_dead(client, name):
    shared(client, name, optserve.Bounded(0, lease_s=1.0))
    dead = client.worker(name, "dead")
    dead._register()
    with client.worker(name, "alive") as alive:
        alive.pull()
        begun = time.monotonic()
        for _ in range(3):
            alive.step(full(-1), timeout_s=20)
        assert time.monotonic() - begun < 10
        assert alive.current_step == 3


def test_with_too_few_workers_alive_a_step_is_refused_and_made_when_another_comes(client, name):
    shared(client, name, optserve.Sync(2))
    with client.worker(name, "one") as one:
        one.pull()
        with pytest.raises(optserve.UnavailableError, match="takes 2 workers, of which 1 are alive"):
            one.step(full(-1), timeout_s=0.5)

        def second() -> None:
            with client.worker(name, "two") as two:
                two.pull()
                two.step(full(-3))

        run_all([lambda: one.step(full(-1)), second])
        assert np.all(one.pull().arrays["b"] == 2)


def test_who_waits_alone_is_told_after_seconds_who_is_there(client, name, caplog):
    shared(client, name, optserve.Sync(2))
    with client.worker(name, "gone"):
        pass
    with client.worker(name, "one") as one:
        one.pull()
        there = r"takes 2 workers, of which 1 are alive \('one'\)\. No longer alive: 'gone'\."
        raised: optserve.OptserveError | None = None
        # On a busy machine a deadline may fall into one of the tries, and then says nothing of the pauses between them.
        for _ in range(5):
            caplog.clear()
            with pytest.raises((optserve.TooFewWorkersError, optserve.DeadlineExceededError)) as caught:
                one.step(full(-1), timeout_s=3.5)
            raised = caught.value
            if isinstance(raised, optserve.TooFewWorkersError):
                break
        assert isinstance(raised, optserve.TooFewWorkersError)
        assert re.search(there, raised.message)
        assert [record.levelname for record in caplog.records if re.search(there, record.getMessage())] == ["WARNING"]
        caplog.clear()
        # One that is there and slow is waited for, without a word.
        with client.worker(name, "slow"):
            with pytest.raises(optserve.DeadlineExceededError):
                one.step(full(-1), timeout_s=2.5)
            assert not caplog.records


def waits(worker: optserve.Worker) -> threading.Event:
    """Is set once a step of that worker is being made."""
    waiting = threading.Event()

    def look() -> None:
        while worker._optimizer._session._patience is None:
            time.sleep(0.001)
        waiting.set()

    threading.Thread(target=look, daemon=True).start()
    return waiting


@pytest.mark.parametrize("alone", [False, True])
def test_leaving_the_block_interrupts_a_step_that_waits_and_takes_the_leave_at_once(client, name, alone):
    opt = shared(client, name, optserve.Sync(2))
    raised: list[BaseException] = []
    threads: list[threading.Thread] = []
    begun = 0.0

    def step(worker: optserve.Worker) -> None:
        try:
            worker.step(full(-1))
        except optserve.OptserveError as error:
            raised.append(error)

    with ExitStack() as others:
        if not alone:
            others.enter_context(client.worker(name, "other"))
        with suppress(KeyboardInterrupt), client.worker(name, "w") as worker:
            worker.pull()
            waiting = waits(worker)
            threads = [threading.Thread(target=step, args=(worker,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            assert waiting.wait(30)
            begun = time.monotonic()
            # As when somebody presses Ctrl-C while this thread waits for the others.
            raise KeyboardInterrupt
        assert time.monotonic() - begun < 10
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert {type(error) for error in raised} <= {optserve.StepCancelledError, optserve.ClientUseError}
        assert len(raised) == 3
        with client.worker(name, "looks") as looks:
            assert looks.live_workers == (1 if alone else 2)
        with pytest.raises(optserve.ClientUseError, match="has left"):
            worker.step(full(-1))
    assert opt.pull_parameters().step == 0


def test_a_worker_that_comes_back_goes_on_where_it_was(client, name):
    shared(client, name, optserve.Async())
    with client.worker(name, "w") as worker:
        worker.pull()
        for _ in range(3):
            worker.step(full(-1))
    again = client.worker(name, "w")
    with again:
        assert again.steps_made == 3
        again.pull()
        again.step(full(-1))
        assert again.current_step == 4


def test_a_worker_that_comes_late_need_not_catch_up(client, name):
    shared(client, name, optserve.Bounded(0))
    with client.worker(name, "early") as early:
        early.pull()
        for _ in range(5):
            early.step(full(-1))
        with client.worker(name, "late") as late:
            late.pull()
            for _ in range(3):
                late.step(full(-1))
                early.step(full(-1))


def test_a_worker_that_comes_back_does_not_wait_for_who_came_in_between(client, name):
    shared(client, name, optserve.Bounded(0))
    with client.worker(name, "old") as old:
        old.pull()
        for _ in range(5):
            old.step(full(-1))
    with client.worker(name, "new") as new:
        new.pull()
        with client.worker(name, "old") as again:
            again.pull()
            again.step(full(-1), timeout_s=10)
            new.step(full(-1), timeout_s=10)


@pytest.mark.parametrize("consistency", [optserve.Async(), optserve.Bounded(0), optserve.Sync(1)])
def test_of_two_lives_of_one_name_only_the_later_one_goes_on(client, name, consistency):
    opt = shared(client, name, consistency)
    with client.worker(name, "w") as one:
        one.pull()
        one.step(full(-1))
        with client.worker(name, "w") as other:
            assert other.steps_made == 1
            other.pull()
            other.step(full(-10))
            for _ in range(2):
                with pytest.raises(optserve.WorkerReplacedError, match="enter it as a new worker"):
                    one.step(full(-100))
                with pytest.raises(optserve.WorkerReplacedError):
                    one.refresh()
                other.step(full(-10))
            assert other.steps_made == 4
        # Nor does it come back when the other has left.
        with pytest.raises(optserve.WorkerReplacedError):
            one.step(full(-100))
    assert np.all(opt.pull_parameters().arrays["b"] == 31)


def test_a_life_that_is_over_does_not_take_the_leave_of_the_next(client, name):
    shared(client, name, optserve.Async())
    with client.worker(name, "w") as one, ExitStack() as later:
        one.pull()
        other = later.enter_context(client.worker(name, "w"))
        other.pull()
        one.__exit__(None, None, None)
        other.step(full(-1))
        assert other._register().live_workers == 1


def test_a_restore_in_the_middle_of_a_workers_step_refuses_it_and_the_worker_can_go_on(client, name):
    opt = shared(client, name, optserve.Async(scale_by_staleness=True))
    opt.save_checkpoint("start")
    with client.worker(name, "w") as worker:
        worker.pull()
        worker.step(full(-1))
        with worker._optimizer.begin_step() as step:
            step.send("w", full(-1)["w"])
            opt.restore_checkpoint("start")
            step.send("b", full(-1)["b"])
            with pytest.raises(optserve.StateReplacedError):
                step._finish()
            step._abort()
            step._failure = None
        found = opt.pull_parameters()
        assert found.step == 0
        assert np.all(found.arrays["b"] == 0)
        worker.refresh()
        worker.pull()
        worker.step(full(-1))
        assert np.all(worker.pull().arrays["b"] == 1)


def test_a_restore_leaves_the_consistency_as_it_is(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), MODEL, hosted=True)
    opt.save_checkpoint("alone")
    opt.update(consistency=optserve.Async())
    with client.worker(name, "w") as worker:
        opt.restore_checkpoint("alone")
        worker.refresh()
        worker.pull()
        worker.step(full(-1))
    assert opt.consistency == optserve.Async()


def test_a_reply_from_before_there_were_workers_is_gone_after_their_steps(stub, name):
    made = create(stub, name, {"x": (2,)}, mode=optimizer_pb2.MODE_HOSTED).name
    place(stub, made, X)
    with stream(stub, made) as steps:
        steps.send(begin("alone"), chunk(0, 0, np.ones(2, np.float32).tobytes()), commit())
        steps.reply()
    for consistency in (optimizer_pb2.Consistency(sync=optimizer_pb2.SyncConsistency(workers=1)), None):
        changed = optimizer_pb2.Optimizer(name=made, consistency=consistency)
        stub.UpdateOptimizer(
            service_pb2.UpdateOptimizerRequest(optimizer=changed, update_mask=FieldMask(paths=["consistency"]))
        )
        if consistency is not None:
            report(stub, made, "w")
            with stream(stub, made, worker="w") as steps:
                steps.send(begin(), chunk(0, 0, np.full(2, 7, np.float32).tobytes()), commit())
                steps.reply()
            report(stub, made, "w", replicas_pb2.WORKER_STATE_LEAVING)
    with stream(stub, made) as steps:
        # Known no more, so it is another step: one without its gradient.
        steps.send(begin("alone"), commit())
        assert details(steps.error())[0] == "MISSING_CHUNK"


@pytest.mark.parametrize("request_id", ["step-1", "step-3"])
def test_what_a_stream_that_was_given_up_brings_late_is_not_applied(stub, made, request_id):
    report(stub, made, "w")
    with stream(stub, made, worker="w") as abandoned, stream(stub, made, worker="w") as steps:
        for number in (1, 2):
            steps.send(begin(f"step-{number}"), chunk(0, 0, bytes(8)), commit())
            assert steps.reply()[1].step == number
        abandoned.send(begin(request_id), chunk(0, 0, bytes(8)), commit())
        assert details(abandoned.error())[0] == "STEP_TAKEN_OVER"
        steps.send(begin("step-3"), chunk(0, 0, bytes(8)), commit())
        assert steps.reply()[1].step == 3


@pytest.fixture
def made(stub, name) -> str:
    """An optimizer for workers, on the wire."""
    resource = create(stub, name, {"x": (2,)}, **HOSTED).name
    place(stub, resource, X)
    return resource


def test_only_workers_that_are_alive_may_step_or_pull(stub, made):
    with stream(stub) as opened, refused(FAILED_PRECONDITION, "WORKER_UNKNOWN", "open.worker"):
        opened.open(made, worker="w")
    with refused(FAILED_PRECONDITION, "WORKER_UNKNOWN", "worker"):
        list(stub.PullParameters(replicas_pb2.PullParametersRequest(name=made, worker="w")))
    report(stub, made, "w")
    with stream(stub, made, worker="w") as steps_of_w:
        report(stub, made, "w", replicas_pb2.WORKER_STATE_LEAVING)
        steps_of_w.send(begin())
        reason, metadata, _, _ = details(steps_of_w.error())
        assert (reason, metadata["worker"]) == ("WORKER_UNKNOWN", "w")


def test_a_lease_runs_out_unless_it_is_renewed(stub, name):
    consistency = optimizer_pb2.Consistency(sync=optimizer_pb2.SyncConsistency(workers=1))
    consistency.lease.FromSeconds(1)
    resource = create(stub, name, {"x": (2,)}, mode=optimizer_pb2.MODE_HOSTED, consistency=consistency).name
    place(stub, resource, X)
    assert report(stub, resource, "a").lease.seconds == 1
    assert report(stub, resource, "b").live_workers == 2
    deadline = time.monotonic() + 10
    while report(stub, resource, "b").live_workers == 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with stream(stub) as opened, refused(FAILED_PRECONDITION, "WORKER_UNKNOWN", "open.worker"):
        opened.open(resource, worker="a")


def test_where_there_are_workers_each_says_who_it_is_and_elsewhere_nobody_does(stub, name, made):
    plain = create(stub, f"{name}-plain", {"x": (2,)}).name
    for resource, options in ((made, {}), (plain, {"worker": "w"})):
        with stream(stub) as opened, refused(INVALID, "INVALID_FIELD", "open.worker"):
            opened.open(resource, **options)
    with refused(INVALID, "INVALID_FIELD", "worker"):
        report(stub, plain, "w")
    for worker in ("", "a" * 65, "ä", "a\n"):
        with refused(INVALID, "INVALID_FIELD", "worker"):
            report(stub, made, worker)
    with stream(stub, plain) as opened:
        opened.send(begin(parameters_step=0), commit())
        reason, _, field, _ = details(opened.error())
        assert (reason, field) == ("INVALID_FIELD", "begin.parameters_step")


def test_a_gradient_cannot_be_of_a_step_that_has_not_been(stub, made):
    report(stub, made, "w")
    with stream(stub, made, worker="w") as steps:
        steps.send(begin(parameters_step=1), commit())
        reason, _, field, _ = details(steps.error())
        assert (reason, field) == ("INVALID_FIELD", "begin.parameters_step")
        steps.send(begin(), chunk(0, 0, X.tobytes()), commit())
        assert steps.reply()[1].step == 1


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


def test_a_unary_step_can_be_an_async_workers_and_no_others(stub, name, made):
    report(stub, made, "w")
    gradient = steps_pb2.Tensor(name="x", data=X.tobytes())
    request = steps_pb2.ApplyGradientsRequest(name=made, request_id="one", gradients=[gradient], worker="w")
    assert stub.ApplyGradients(request).result.step == 1
    assert stub.ApplyGradients(request).result.replayed
    consistency = optimizer_pb2.Consistency(sync=optimizer_pb2.SyncConsistency(workers=1))
    other = create(stub, f"{name}-sync", {"x": (2,)}, mode=optimizer_pb2.MODE_HOSTED, consistency=consistency).name
    request.name = other
    with refused(INVALID, "INVALID_FIELD", "worker"):
        stub.ApplyGradients(request)


def test_a_step_that_waits_is_let_go_when_its_client_is_gone_or_the_server_stops():
    with optserve.local_server() as server, optserve.connect(server.target) as client:
        shared(client, "a", optserve.Sync(2))
        with client.worker("a", "other"), client.worker("a", "w") as worker:
            worker.pull()
            with pytest.raises(optserve.DeadlineExceededError):
                worker.step(full(-1), timeout_s=0.3)

            def wait() -> None:
                with suppress(optserve.OptserveError):
                    worker.step(full(-1))

            waiting = threading.Thread(target=wait)
            waiting.start()
            while worker._optimizer._session._patience is None:
                time.sleep(0.001)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(15) == 0
            assert time.monotonic() - begun < 8
            client.close()
            waiting.join(20)
            assert not waiting.is_alive()


def test_more_workers_than_there_are_streams_are_refused(tmp_path):
    with (
        optserve.local_server(options=config_of(tmp_path, max_streams=4)) as server,
        optserve.connect(server.target) as client,
        pytest.raises(optserve.InvalidArgumentError, match="3 workers and 1 more cannot be connected"),
    ):
        shared(client, "a", optserve.Sync(3, backup_workers=1))


def test_a_restore_and_steps_of_workers_survive_a_crash(tmp_path):
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = shared(client, "a", optserve.Async())
        with client.worker("a", "w") as worker:
            worker.pull()
            worker.step(full(-1))
            opt.save_checkpoint("one")
            worker.step(full(-1))
            opt.restore_checkpoint("one")
            worker.refresh()
            worker.pull()
            worker.step(full(-10))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        with client.worker("a", "w") as worker:
            assert np.all(worker.pull().arrays["b"] == 11)
            worker.step(full(-1))
        assert client.optimizer("a").pull_parameters().step == 3


def test_exactly_once_per_worker_over_a_restart(tmp_path):
    with ExitStack() as stack:
        server = stack.enter_context(optserve.local_server(tmp_path))
        with grpc.insecure_channel(server.target) as channel:
            stub = service_pb2_grpc.OptimizerServiceStub(channel)
            made = create(stub, "a", {"x": (2,)}, **HOSTED).name
            place(stub, made, X)
            for worker in ("one", "two"):
                report(stub, made, worker)
                with stream(stub, made, worker=worker) as steps:
                    steps.send(begin("step-1"), chunk(0, 0, X.tobytes()), commit())
                    steps.reply()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        again = stack.enter_context(optserve.local_server(tmp_path))
        with grpc.insecure_channel(again.target) as channel:
            stub = service_pb2_grpc.OptimizerServiceStub(channel)
            for worker, step in (("one", 1), ("two", 2)):
                assert report(stub, made, worker).last_request_id == "step-1"
                with stream(stub, made, worker=worker) as steps:
                    steps.send(begin("step-1", reply=steps_pb2.REPLY_NOTHING), commit())
                    _, result = steps.reply()
                    assert (result.step, result.replayed) == (step, True)
                    steps.send(begin("step-1"))
                    assert details(steps.error())[0] == "REPLY_GONE"
            assert report(stub, made, "one").step == 2


def test_replies_are_kept_worker_by_worker(stub, made):
    gradients = itertools.count(1)
    with ExitStack() as stack:
        streams = {}
        for worker in ("one", "two"):
            report(stub, made, worker)
            streams[worker] = stack.enter_context(stream(stub, made, worker=worker))
        replies = {}
        for worker, steps in streams.items():
            data = np.full(2, next(gradients), np.float32).tobytes()
            steps.send(begin("same", reply=steps_pb2.REPLY_PARAMETERS), chunk(0, 0, data), commit())
            replies[worker] = steps.reply()
        for worker, steps in streams.items():
            steps.send(begin("same", reply=steps_pb2.REPLY_PARAMETERS), commit())
            payload, result = steps.reply()
            assert (payload, result.replayed) == (replies[worker][0], True)
