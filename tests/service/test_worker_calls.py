"""Workers on the wire: who may call what, and which replies are kept."""

import itertools
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from optserve.v1 import optimizer_pb2, replicas_pb2, service_pb2, steps_pb2
from service.wire_client import begin, chunk, commit, create, details, refused, stream
from service.worker_harness import HOSTED, X, place, report

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


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


def test_who_reports_is_told_its_lease_and_how_many_are_alive(stub, name):
    consistency = optimizer_pb2.Consistency(sync=optimizer_pb2.SyncConsistency(workers=1))
    consistency.lease.FromSeconds(7)
    resource = create(stub, name, {"x": (2,)}, mode=optimizer_pb2.MODE_HOSTED, consistency=consistency).name
    place(stub, resource, X)
    for alive, worker in enumerate(("a", "b"), 1):
        answer = report(stub, resource, worker)
        assert (answer.lease.seconds, answer.live_workers) == (7, alive)


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
