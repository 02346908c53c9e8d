"""Workers that leave, come back, come late, or come twice at a time; and what is known of them after a crash."""

import os
import signal
from contextlib import ExitStack

import grpc
import numpy as np
import pytest

import optserve
from optserve.v1 import service_pb2_grpc, steps_pb2
from service.wire_client import begin, chunk, commit, create, details, stream
from service.worker_harness import HOSTED, X, full, over_both_transports, place, report, shared

client = over_both_transports


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


@pytest.mark.parametrize("failure", [
    optserve.UnavailableError("about to stop", reason="DRAINING"),
    optserve.StepCancelledError("cancelled"),
    optserve.ResourceExhaustedError("full", retry_after_s=1.0),
], ids=lambda failure: type(failure).__name__)  # fmt: skip
def test_an_applied_step_is_never_said_to_have_failed_where_newer_parameters_cannot_be_read(failure, monkeypatch):
    """The caller would send the gradient once more. That the reply is gone is known only after a restart."""
    gone = optserve.StepInDoubtError("applied")
    gone.__cause__ = optserve.FailedPreconditionError("gone", reason="REPLY_GONE")

    def fail(error):
        def call(*_args, **_kwargs):
            raise error

        return call

    with optserve.local_server(backend="numpy") as server, optserve.connect(server.target) as client:
        shared(client, "a", optserve.Async())
        with client.worker("a", "w") as worker:
            monkeypatch.setattr(worker._optimizer, "_step", fail(gone))
            monkeypatch.setattr(worker._optimizer, "_refresh", fail(failure))
            with pytest.raises(optserve.StepInDoubtError) as raised:
                worker.step(full(-1))
    assert raised.value is gone
