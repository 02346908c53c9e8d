"""A server that answers garbage: each kind is a typed error in time, and what the caller has is right or untouched."""

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

import optserve
from client.evil_server import (
    DIRTY,
    DTYPES,
    FIRST,
    REPLIED,
    SHAPES,
    SIZE,
    SIZES,
    TAG,
    End,
    EvilServer,
    EvilSocket,
    Refusal,
    chunk,
    exported,
    pulled,
)
from optserve.v1 import optimizer_pb2, service_pb2, steps_pb2

MUTATIONS = 60
LATEST_S = 30.0
"""A call has ended by then on a busy machine too; one that hangs has not."""


def config(timeout_s: float) -> optserve.ClientConfig:
    return optserve.ClientConfig(
        connect_timeout_s=timeout_s,
        timeout_s=timeout_s,
        step_timeout_s=timeout_s,
        initial_backoff_s=0.02,
        max_backoff_s=0.1,
        max_receive_bytes=8 << 20,
    )


PATIENT, HURRIED = config(20), config(0.7)
"""For what is known at once, and for what takes the whole deadline."""
GRADIENTS = {
    name: np.arange(1, 1 + np.prod(shape), dtype=DTYPES[name]).reshape(shape) for name, shape in SHAPES.items()
}
OLD = 7.0
EVERY = {"w": 4, "none": 0, "b": 3}


class Kind(NamedTuple):
    """One kind of garbage.

    Attributes:
        label: What is wrong.
        method: Whose answers it takes the place of.
        twist: From the right answers to these.
        error: What the call raises.
        act: What the client does; by default what asks for that method.
        hurried: Whether it is tried again until the deadline.
    """

    label: str
    method: str
    twist: Callable[[list], Any]
    error: type[Exception] | tuple[type[Exception], ...] = optserve.InternalError
    act: str = ""
    hurried: bool = False


def changed(change: Callable[[Any], object], which: int = -1) -> Callable[[list], list]:
    """The right answers, one of which has been changed in place."""

    def twist(answers: list) -> list:
        change(answers[which])
        return answers

    return twist


def fields(path: str = "", **values: object) -> Callable[[list], list]:
    """Likewise, by other values of fields of the message at that path."""

    def change(message: Any) -> None:
        for part in filter(None, path.split(".")):
            message = message[int(part)] if part.isdecimal() else getattr(message, part)
        for field, value in values.items():
            message.ClearField(field)
            if value is None:
                continue
            if isinstance(value, list):
                getattr(message, field).extend(value)
            else:
                setattr(message, field, value)

    return changed(change, 0 if path.startswith(("optimizer", "opened")) else -1)


def answering(*answers: object) -> Callable[[list], list]:
    return lambda right: list(answers)


def before_the_result(*extra: object) -> Callable[[list], list]:
    return lambda right: [*right[:-1], *extra, right[-1]]


def endless(make: Callable[[int], object]) -> Callable[[list], Iterator]:
    return lambda right: map(make, itertools.count())


def refusal(
    code: int = code_pb2.ABORTED, request_id: str = "", message: str = "no", details: list | None = None
) -> Any:
    status = status_pb2.Status(code=code, message=message)
    for detail in details or []:
        if isinstance(detail, bytes):
            status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=detail)
        else:
            status.details.add().Pack(detail)
    return steps_pb2.StreamStepsResponse(error=steps_pb2.StepError(request_id=request_id, status=status))


def wrong_step(**metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason="WRONG_STEP", domain="optserve.v1", metadata=metadata)


def retry(seconds: int) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.seconds = seconds
    return info


def trailer(value: bytes) -> Refusal:
    return Refusal(grpc.StatusCode.INTERNAL, "a fault", (("grpc-status-details-bin", value),))


METHODS = {
    "GetServerInfo": "connect", "GetOptimizer": "find", "CreateOptimizer": "create", "UpdateOptimizer": "update",
    "DeleteOptimizer": "delete", "ListOptimizers": "list", "ReportWorker": "work", "SaveCheckpoint": "save",
    "ListCheckpoints": "checkpoints", "RestoreCheckpoint": "restore", "DeleteCheckpoint": "drop",
    "ImportState": "import", "PushParameters": "push", "PullParameters": "pull", "ExportState": "export",
    "AddParameters": "add", "GetStatistics": "statistics", "open": "step", "step": "step",
}  # fmt: skip
"""What the client calls, and how; a stream of steps in its two parts."""

CLOSED = (optserve.UnavailableError, optserve.DeadlineExceededError)
LATE = optserve.DeadlineExceededError
HUGE = 1 << 62
NO_ROOM = (optserve.ResourceExhaustedError, optserve.InternalError)

ANY_METHOD = [
    *(Kind("bytes that are no message", method, answering(b"\xff" * 9)) for method in METHODS),
    *(Kind("no message", method, answering(End()), CLOSED if method in ("open", "step") else optserve.InternalError)
      for method in METHODS),
    *(Kind("silence", method, answering(None), LATE) for method in ("GetOptimizer", "PullParameters", "open", "step")),
    # gRPC waits for the end of such a call until its deadline.
    Kind("two answers", "GetOptimizer", lambda right: [right[0], right[0]], optserve.OptserveError, hurried=True),
    *(Kind("details that are no Status", method, answering(trailer(b"\xff\xff"))) for method in METHODS),
    *(Kind(f"the code {code.name}", "GetOptimizer", answering(Refusal(code)), optserve.OptserveError)
      for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE", "CANCELLED")),
    Kind("details with a Status that is empty", "GetOptimizer", answering(trailer(b""))),
]  # fmt: skip

OPENED = [
    Kind("a result first", "open", answering(steps_pb2.StreamStepsResponse(result=steps_pb2.Result(step=1)))),
    Kind("an empty message", "open", answering(steps_pb2.StreamStepsResponse())),
    Kind("no limits", "open", fields("opened", limits=None)),
    Kind("chunks of 0 bytes", "open", fields("opened.limits", max_chunk_bytes=0)),
    Kind("chunks of 3 bytes", "open", fields("opened.limits", max_chunk_bytes=3)),
    Kind("chunks of 3 bytes liked best", "open", fields("opened.limits", preferred_chunk_bytes=3)),
    Kind("a parameter that there is not", "open", fields("opened", last_tensors=[3])),
    Kind("a parameter twice", "open", fields("opened", last_tensors=[0, 0])),
    Kind("an older step", "open", fields("opened", step=0), optserve.StepsLostError, "reopen"),
    Kind("another lineage", "open", fields("opened", lineage="x"), optserve.StateReplacedError),
    Kind("memory that was not asked for", "open", fields("opened.shared_memory", segment="sysv:1"), ()),
]

STEPS = [
    Kind("a tensor twice", "step", lambda right: [right[0], right[0], right[1]]),
    Kind("a tensor twice and another not at all", "step",
         lambda right: [right[0], chunk(0, 0, bytes(SIZES["w"])), chunk(0, 0, bytes(8)), result_of(right)]),
    Kind("a tensor not at all", "step", lambda right: right[1:]),
    Kind("nothing but the result", "step", lambda right: [result_of(right)]),
    Kind("tensors in another order", "step", lambda right: [*without_result(right)[::-1], result_of(right)]),
    Kind("half a tensor", "step", changed(lambda last: last.ClearField("data"))),
    Kind("a byte too few", "step", fields(data=bytes(SIZES["b"] - 1))),
    Kind("a byte too many", "step", fields(data=bytes(SIZES["b"] + 1))),
    Kind("an element too few", "step", fields(data=bytes(SIZES["b"] - 8))),
    Kind("an element too many", "step", fields(data=bytes(SIZES["b"] + 8))),
    Kind("a cut within an element", "step",
         lambda right: [chunk(0, 0, bytes(2)), chunk(0, 2, bytes(14)), right[1]]),
    Kind("a megabyte too much", "step", before_the_result(chunk(2, 0, bytes(1 << 20)))),
    Kind("a tensor that there is not", "step", before_the_result(chunk(9, 0, bytes(8)))),
    Kind("an offset beyond everything", "step", fields("chunk", offset=(1 << 64) - 1)),
    Kind("an offset in the middle", "step", fields("chunk", offset=8)),
    Kind("the right place, named by another tensor", "step", fields("chunk", tensor=0, offset=SIZES["w"]), ()),
    Kind("an empty chunk", "step", before_the_result(chunk(0, 0, b""))),
    Kind("empty chunks without end", "step", endless(lambda _: chunk(0, 0, b""))),
    Kind("chunks without end", "step", endless(lambda _: chunk(0, 0, bytes(SIZES["w"])))),
    Kind("empty messages without end", "step", endless(lambda _: steps_pb2.StreamStepsResponse())),
    Kind("a payload without a place", "step", changed(lambda first: first.ClearField("chunk"), 0)),
    Kind("a payload beside the result", "step",
         lambda right: [*without_result(right), result_of(right, data=bytes(8))]),
    Kind("opened again", "step", before_the_result(steps_pb2.StreamStepsResponse(opened=steps_pb2.Opened(step=1)))),
    Kind("the result of another step", "step", fields("result", request_id="another")),
    Kind("a result without a request id", "step", fields("result", request_id="")),
    Kind("step 1,000 after 0", "step", fields("result", step=1000)),
    Kind("step 0 after 0", "step", fields("result", step=0)),
    Kind("the largest step", "step", fields("result", step=(1 << 64) - 1)),
    Kind("a result twice", "step", lambda right: [*right, result_of(right)], (), ""),
    Kind("the end in the middle of the reply", "step", lambda right: [right[0], End()], CLOSED),
    Kind("silence in the middle of the reply", "step", lambda right: [right[0], None], LATE),
    Kind("garbage in the middle of the reply", "step", lambda right: [right[0], b"\xff" * 70_000]),
    Kind("a refusal in the middle of the reply", "step",
         lambda right: [right[0], refusal()]),
    Kind("a message that is too large", "step",
         before_the_result(bytes(9 << 20)), optserve.ResourceExhaustedError),
    Kind("a reply that was replayed and never asked for", "step",
         fields("result", replayed=True)),
    Kind("a replay that is none", "step", fields("result", replayed=False), act="replay"),
    Kind("a replay of another step", "step", fields("result", step=2), act="replay"),
    Kind("a replay with another request id", "step", fields("result", request_id="x"), act="replay"),
    Kind("a replay with a tensor twice", "step", lambda right: [right[0], *right], act="replay"),
]  # fmt: skip

REFUSALS = [
    Kind("an error without a status", "step", answering(steps_pb2.StreamStepsResponse(error=steps_pb2.StepError()))),
    Kind("an error that says OK", "step", answering(refusal(code_pb2.OK))),
    Kind("an error about another step", "step", answering(refusal(request_id="another"))),
    Kind("a code that there is not", "step", answering(refusal(99)), optserve.OptserveError),
    Kind("a reason that there is not", "step",
         answering(refusal(details=[error_details_pb2.ErrorInfo(reason="NEW")])), optserve.AbortedError),
    Kind("details that are none", "step", answering(refusal(details=[b"\xff\xff"])), optserve.AbortedError),
    Kind("WRONG_STEP without a step", "step", answering(refusal(details=[wrong_step()])), optserve.AbortedError),
    Kind("WRONG_STEP with a word", "step",
         answering(refusal(details=[wrong_step(current_step="x")])), optserve.AbortedError),
    Kind("WRONG_STEP with 5,000 digits", "step",
         answering(refusal(details=[wrong_step(current_step="9" * 5000)])), optserve.AbortedError),
    Kind("a pause of minus a year", "step", answering(refusal(details=[retry(-(1 << 40))])), optserve.OptserveError,
         hurried=True),
    Kind("a pause of an age", "step", answering(refusal(details=[retry(1 << 60)])), optserve.AbortedError),
    Kind("taken over without end", "step",
         answering(refusal(details=[error_details_pb2.ErrorInfo(reason="STEP_TAKEN_OVER")])),
         optserve.OptserveError, hurried=True),
    Kind("a very long message", "step", answering(refusal(message="\x1b[2J" * 10_000)), optserve.AbortedError),
]  # fmt: skip

OPTIMIZERS = [
    Kind("no optimizer", method, fields(optimizer=None), act=act)
    for method, act in (("GetOptimizer", "find"), ("CreateOptimizer", "create"), ("RestoreCheckpoint", "restore"),
                        ("ImportState", "import"), ("GetOptimizer", "refresh"), ("AddParameters", "add"))
] + [
    Kind("another optimizer", "GetOptimizer", fields("optimizer", name="optimizers/other")),
    Kind("no parameters", "GetOptimizer", fields("optimizer", parameters=None)),
    Kind("a data type that there is not", "GetOptimizer", fields("optimizer.parameters.0", data_type=77)),
    Kind("a data type of the wire only", "GetOptimizer",
         fields("optimizer.parameters.0", data_type=optimizer_pb2.DATA_TYPE_BFLOAT16)),
    Kind("two parameters of one name", "GetOptimizer", fields("optimizer.parameters.0", name="b")),
    Kind("a parameter without a name", "GetOptimizer", fields("optimizer.parameters.0", name="")),
    Kind("two slots of one name", "GetOptimizer", fields("optimizer", slots=["a", "a"])),
    Kind("a parameter of 2^62 elements", "GetOptimizer",
         fields("optimizer.parameters.0", shape=[HUGE]), NO_ROOM, "find and pull"),
    Kind("a parameter of 2^50 elements", "GetOptimizer",
         fields("optimizer.parameters.0", shape=[1 << 50]), NO_ROOM, "find and pull"),
    Kind("a parameter of 200 dimensions", "GetOptimizer",
         fields("optimizer.parameters.0", shape=[1] * 200), NO_ROOM, "find and pull"),
    Kind("a method that there is not", "GetOptimizer",
         fields("optimizer", algorithm=None), optserve.FeatureUnavailableError, "settings"),
    Kind("a lease of an age", "GetOptimizer",
         changed(lambda answer: answer.optimizer.consistency.lease.FromSeconds(1) or setattr(
             answer.optimizer.consistency.lease, "seconds", 1 << 62) or getattr(
             answer.optimizer.consistency, "async").SetInParent()), (), "consistency"),
    Kind("other parameters than those wanted", "CreateOptimizer", fields("optimizer.parameters.0", shape=[5])),
    Kind("a parameter fewer than wanted", "CreateOptimizer",
         changed(lambda answer: answer.optimizer.parameters.pop())),
    Kind("a parameter fewer than added", "AddParameters",
         changed(lambda answer: answer.optimizer.parameters.pop())),
    Kind("a parameter of another shape than added", "AddParameters", fields("optimizer.parameters.3", shape=[5])),
    Kind("the parameters in another order", "AddParameters",
         changed(lambda answer: answer.optimizer.parameters.sort(key=lambda parameter: parameter.name))),
]  # fmt: skip

OTHERS = [
    Kind("pages that lead back", "ListOptimizers", fields(next_page_token="t")),  # noqa: S106 - no secret
    Kind("checkpoints that lead back", "ListCheckpoints", fields(next_page_token="t")),  # noqa: S106 - no secret
    Kind("pages without end", "ListOptimizers", lambda right: [
        service_pb2.ListOptimizersResponse(next_page_token=str(time.monotonic_ns()))], LATE),
    Kind("a checkpoint of another optimizer", "ListCheckpoints",
         fields("checkpoints.0", name="optimizers/n/checkpoints/a")),
    Kind("a checkpoint without a name", "ListCheckpoints", fields("checkpoints.0", name="")),
    Kind("a checkpoint of another tag", "SaveCheckpoint", fields("checkpoint", name=TAG + "x")),
    Kind("no checkpoint", "SaveCheckpoint", fields(checkpoint=None)),
    Kind("a checkpoint of the year 10^11", "SaveCheckpoint", fields("checkpoint.create_time", seconds=HUGE)),
    Kind("a start in the year 10^11", "GetServerInfo", changed(lambda info: setattr(info.start_time, "seconds", HUGE))),
    Kind("a lease of 0 s", "ReportWorker", fields(lease=None)),
    Kind("a lease of minus a year", "ReportWorker", fields("lease", seconds=-(1 << 40))),
    Kind("a lease of an age", "ReportWorker", fields("lease", seconds=HUGE)),
    Kind("a lease of 7,000 years", "ReportWorker", fields("lease", seconds=7_000 * 31_000_000), ()),
    Kind("a request id of 5,000 digits", "ReportWorker", fields(last_request_id="step-" + "9" * 5000), ()),
    Kind("statistics of no parameter", "GetStatistics", fields(tensors=None)),
    Kind("statistics of a parameter that there is not", "GetStatistics", fields("tensors.2", tensor=9)),
    Kind("statistics of a parameter twice", "GetStatistics", fields("tensors.2", tensor=1)),
    Kind("statistics with a quantile too few", "GetStatistics",
         fields("tensors.0", effective_rate_quantiles=[1.0] * 4)),
    Kind("statistics without slots", "GetStatistics", fields("tensors.0.elements.0", slots=None)),
    Kind("statistics with too many slots", "GetStatistics", fields("tensors.0.elements.0", slots=[1.0] * 9)),
    Kind("statistics of another element", "GetStatistics", fields("tensors.0.elements.0", index=1)),
    Kind("statistics of an element that cannot be", "GetStatistics",
         fields("tensors.0.elements.0", index=(1 << 64) - 1)),
    Kind("statistics without elements", "GetStatistics", fields("tensors.0", elements=None)),
]  # fmt: skip

STREAMS = [
    Kind("a tensor twice", "PullParameters", lambda right: [right[0], right[1], *right[1:]]),
    Kind("a tensor not at all", "PullParameters", lambda right: right[:-1]),
    Kind("only the first message", "PullParameters", lambda right: right[:1]),
    Kind("no first message", "PullParameters", lambda right: right[1:]),
    Kind("a tensor that there is not", "PullParameters", lambda right: [right[0], pulled(9, 0, bytes(8))]),
    Kind("a byte too many", "PullParameters", fields(data=bytes(SIZES["b"] + 1))),
    Kind("chunks without end", "PullParameters",
         lambda right: itertools.chain(right[:1], (pulled(0, 0, bytes(4)) for _ in itertools.count()))),
    Kind("messages without a chunk", "PullParameters",
         lambda right: itertools.chain(right[:1], itertools.repeat(right[0]))),
    Kind("not newer, and nobody asked", "PullParameters", lambda right: [changed(
        lambda first: setattr(first, "not_modified", True))(right[:1])[0]]),
    Kind("not newer, with parameters", "PullParameters",
         changed(lambda first: setattr(first, "not_modified", True), 0), act="pull newer"),
    Kind("older than asked for", "PullParameters", lambda right: right, act="pull newer"),
    Kind("silence in the middle", "PullParameters", lambda right: [*right[:2], None], LATE),
    Kind("garbage in the middle", "PullParameters", lambda right: [*right[:2], b"\xff" * 70_000]),
    Kind("an array twice", "ExportState", lambda right: [right[0], right[1], *right[1:]]),
    Kind("an array twice and another not at all", "ExportState",
         lambda right: [right[0], right[1], right[1], *right[3:]]),
    Kind("an array not at all", "ExportState", lambda right: right[:-1]),
    Kind("no optimizer", "ExportState", lambda right: right[1:]),
    Kind("only the optimizer", "ExportState", lambda right: right[:1]),
    Kind("another optimizer", "ExportState", fields("optimizer", name="optimizers/other")),
    Kind("steps of fewer parameters", "ExportState", changed(lambda first: first.parameter_steps.append(1), 0)),
    Kind("more steps than a state can have made", "ExportState",
         changed(lambda first: first.parameter_steps.extend([1, 2, 1 << 63]), 0)),
    Kind("a tensor that there is not", "ExportState", lambda right: [right[0], exported(7, 0)]),
    Kind("a slot that there is not", "ExportState", lambda right: [right[0], exported(0, 5), *right[2:]]),
    Kind("an offset beyond everything", "ExportState",
         lambda right: [right[0], exported(0, 0, (1 << 64) - 1), *right[2:]]),
    Kind("too many bytes", "ExportState", lambda right: [right[0], exported(0, 0, 0, 99), *right[2:]]),
    Kind("a message without a chunk", "ExportState", lambda right: [right[0], right[0]]),
    Kind("chunks without end", "ExportState",
         lambda right: itertools.chain(right[:2], itertools.repeat(right[1]))),
    Kind("a data type that there is not", "ExportState", fields("optimizer.parameters.0", data_type=77)),
    Kind("a parameter of 2^50 elements", "ExportState", fields("optimizer.parameters.0", shape=[1 << 50]), NO_ROOM),
    Kind("a method that there is not", "ExportState",
         fields("optimizer", algorithm=None), optserve.FeatureUnavailableError),
]  # fmt: skip

KINDS = [*ANY_METHOD, *OPENED, *STEPS, *REFUSALS, *OPTIMIZERS, *OTHERS, *STREAMS]


def result_of(right: list, data: bytes = b"") -> steps_pb2.StreamStepsResponse:
    return steps_pb2.StreamStepsResponse(result=right[-1].result, data=data)


def without_result(right: list) -> list:
    right = [steps_pb2.StreamStepsResponse.FromString(answer.SerializeToString()) for answer in right]
    right[-1].ClearField("result")
    return right


@pytest.fixture(scope="module")
def running() -> Iterator[EvilServer]:
    with closing(EvilServer()) as server:
        yield server


@pytest.fixture
def evil(running) -> EvilServer:
    running.reset()
    return running


@pytest.fixture(scope="module")
def clients(running) -> Iterator[dict[bool, optserve.Client]]:
    """By whether they have a short deadline."""
    with optserve.connect(running.target, PATIENT) as patient, optserve.connect(running.target, HURRIED) as hurried:
        yield {False: patient, True: hurried}


def taking() -> dict[str, np.ndarray]:
    """Arrays for a reply, which have something in them."""
    return {name: np.full(shape, OLD, DTYPES[name]) for name, shape in SHAPES.items()}


def is_untouched(out: dict[str, np.ndarray]) -> bool:
    return all((array == OLD).all() for array in out.values())


def is_right(out: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(array, -GRADIENTS[name]) for name, array in out.items())


def prepared(act: str, client: optserve.Client, out: dict[str, np.ndarray]) -> Callable[[], object]:
    """What the client does, once it has done what comes before."""
    if act in ("connect", "find", "create", "delete", "list", "find and pull"):
        parameters = {name: np.zeros(shape, DTYPES[name]) for name, shape in SHAPES.items()}
        specs = {name: optserve.TensorSpec(array.shape, str(array.dtype)) for name, array in parameters.items()}
        return {
            "connect": lambda: optserve.connect(client.target, HURRIED).close(),
            "find": lambda: client.optimizer("m"),
            "find and pull": lambda: client.optimizer("m").pull_parameters(),
            "create": lambda: client.create_optimizer("m", optserve.Momentum(), specs, hosted=True),
            "delete": lambda: client.delete_optimizer("m"),
            "list": lambda: list(client.list_optimizers()),
        }[act]
    opt = client.optimizer("m", transport="grpc")
    if act in ("reopen", "replay"):
        opt.step(GRADIENTS)
    if act == "reopen":
        opt.close()
    if act == "import":
        state = opt.export_state()
        return lambda: opt.import_state(state)
    return {
        "step": lambda: opt.step(GRADIENTS, out=out),
        "reopen": lambda: opt.step(GRADIENTS, out=out),
        "replay": opt.replay,
        "update": lambda: opt.update(optserve.Momentum()),
        "work": lambda: client.worker("m", "a").__enter__().__exit__(None, None, None),
        "save": lambda: opt.save_checkpoint("good"),
        "checkpoints": opt.list_checkpoints,
        "restore": lambda: opt.restore_checkpoint("good"),
        "drop": lambda: opt.delete_checkpoint("good"),
        "add": lambda: opt.add_parameters({"new": np.ones((2, 2), np.float32)}),
        "push": lambda: opt.push_parameters(GRADIENTS),
        "pull": lambda: opt.pull_parameters(out=out),
        "pull newer": lambda: opt.pull_parameters(out=out, newer_than=5),
        "export": opt.export_state,
        "statistics": lambda: opt.statistics(indices=[0]),
        "settings": lambda: opt.algorithm,
        "consistency": lambda: opt.consistency,
        "refresh": opt.refresh,
    }[act]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.act or kind.method}: {kind.label}".replace(" ", "-"))
def test_garbage_is_a_typed_error_in_time_and_harms_nothing(evil, clients, kind):
    connected = clients[kind.error in (LATE, CLOSED) or kind.hurried]
    out = taking()
    call = prepared(kind.act or METHODS[kind.method], connected, out)
    evil.twist = kind.method, kind.twist
    began = time.monotonic()
    if kind.error:
        with pytest.raises(kind.error) as caught:
            call()
        assert isinstance(caught.value, optserve.OptserveError)
    else:
        call()
    assert time.monotonic() - began < LATEST_S
    assert is_untouched(out) or is_right(out)
    # The same client and connection, once the server is in its right mind.
    evil.twist = None
    again = connected.optimizer("m", transport="grpc")
    assert is_right(again.step(GRADIENTS, out=out))


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind.method in ("open", "step")],
    ids=lambda kind: f"{kind.act or kind.method}: {kind.label}".replace(" ", "-"),
)
def test_garbage_leaves_no_stream_open_on_the_server(evil, clients, kind):
    open_before = evil.streams
    opt = clients[kind.error in (LATE, CLOSED) or kind.hurried].optimizer("m", transport="grpc")
    evil.twist = kind.method, kind.twist
    with suppress(optserve.OptserveError):
        opt.step(GRADIENTS)
    opt.close()
    assert evil.wait_for_streams(open_before)


@pytest.mark.parametrize("kind", [kind for kind in STEPS if not kind.act and kind.error], ids=lambda kind: kind.label)
def test_a_handle_goes_on_after_an_answer_to_its_step_that_was_garbage(evil, clients, kind):
    opt = clients[kind.error in (LATE, CLOSED)].optimizer("m", transport="grpc")
    evil.twist = kind.method, kind.twist
    with pytest.raises(optserve.OptserveError):
        opt.step(GRADIENTS)
    evil.twist = None
    # The step was applied, and that is found out.
    with pytest.raises(optserve.StepInDoubtError, match="was applied"):
        opt.step(GRADIENTS)
    assert is_right(opt.replay())
    assert is_right(opt.step(GRADIENTS))
    assert opt.current_step == 2


@pytest.mark.parametrize("method", ["open", "step"])
def test_a_stream_that_a_server_calls_late_is_late_by_the_deadline_of_its_caller(evil, clients, method):
    """It said "within 0 s", since the stream itself has no deadline."""
    opt = clients[False].optimizer("m", transport="grpc")
    evil.twist = method, answering(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED))
    with pytest.raises(optserve.DeadlineExceededError, match=r"within 12\.5 s"):
        opt.step(GRADIENTS, timeout_s=12.5)


def test_there_are_at_least_a_hundred_kinds():
    assert len(KINDS) + len(SEGMENTS) + len(PACKETS) >= 100


SEGMENTS = {
    "no segment": ({"segment": ""}, None),
    "another kind of segment": ({"segment": "memfd:3"}, None),
    "a segment without a number": ({"segment": "sysv:"}, None),
    "a number of 5,000 digits": ({"segment": "sysv:" + "9" * 5000}, None),
    "digits of another script": ({"segment": "sysv:١"}, None),
    "a negative number": ({"segment": "sysv:-1"}, None),
    "a number that C would cut off": ({"segment": f"sysv:{1 << 32}"}, None),
    "a segment that there is not": ({"segment": f"sysv:{(1 << 31) - 1}"}, None),
    "a size of 0": ({"size_bytes": 0}, optserve.InternalError),
    "the largest size": ({"size_bytes": (1 << 64) - 1}, None),
    "another size": ({"size_bytes": FIRST + 3 * SIZE}, None),
    "no offsets": ({"offsets": []}, optserve.InternalError),
    "an offset too few": ({"offsets": [FIRST, FIRST + 16]}, optserve.InternalError),
    "an offset too many": ({"offsets": [FIRST, FIRST + 16, FIRST + 16, FIRST + 48]}, optserve.InternalError),
    "offsets of a curvature": ({"curvature_offsets": [FIRST, FIRST + 16, FIRST + 16]}, optserve.InternalError),
    "an offset beyond the end": ({"offsets": [FIRST, FIRST + 16, FIRST + 2 * SIZE - 16]}, optserve.InternalError),
    "an offset beyond everything": ({"offsets": [FIRST, FIRST, (1 << 64) - 8]}, optserve.InternalError),
    "tensors in one place": ({"offsets": [FIRST, FIRST, FIRST]}, optserve.InternalError),
    "tensors that overlap": ({"offsets": [FIRST, FIRST, FIRST + 8]}, optserve.InternalError),
    "an offset that is not aligned": ({"offsets": [FIRST + 1, FIRST, FIRST + 24]}, optserve.InternalError),
    "a tensor over the dirty word": ({"dirty_offset": FIRST + 8}, optserve.InternalError),
    "a dirty word beyond the end": ({"dirty_offset": 1 << 40}, optserve.InternalError),
    "a dirty word that is not aligned": ({"dirty_offset": DIRTY + 1}, optserve.InternalError),
    "two words in one place": ({"replied_offset": DIRTY}, optserve.InternalError),
    "a word beyond everything": ({"replied_offset": (1 << 64) - 1}, optserve.InternalError),
    "a nonce beyond the end": ({"nonce_offset": FIRST + 2 * SIZE - 8}, optserve.InternalError),
    "a nonce over a word": ({"nonce_offset": REPLIED - 8}, optserve.InternalError),
    "a socket that there is not": ({"control_socket": "optserve-nobody"}, None),
    "a socket whose name is too long": ({"control_socket": "x" * 300}, None),
    "a socket whose name has a zero": ({"control_socket": "a\0b"}, None),
}
"""Offers of shared memory, and the error; None where tensors take another way, which says why."""


@pytest.mark.parametrize("label", SEGMENTS)
def test_a_segment_that_cannot_be_is_a_typed_error_or_not_used(evil, label):
    changes, error = SEGMENTS[label]
    evil.share()
    before = evil.memory.copy()
    fields(**changes)([evil.offer])
    out = taking()
    with optserve.connect(evil.target, PATIENT) as client:
        opt = client.optimizer("m")
        if error is None:
            transport, reason = opt.transport
            assert reason not in ("", "the server is on this host")
            if transport == "grpc":
                evil.memory = np.empty(0, np.uint8)
            assert is_right(opt.step(GRADIENTS, out=out))
            return
        with pytest.raises(error):
            opt.step(GRADIENTS, out=out)
        assert is_untouched(out)
        assert np.array_equal(evil.memory, before)
        evil.reset()
        assert is_right(client.optimizer("m", transport="grpc").step(GRADIENTS, out=out))


def message(**parts: Any) -> bytes:
    return steps_pb2.StreamStepsResponse(**parts).SerializeToString()


PACKETS = {
    "bytes that are no message": ([b"\xff" * 9], optserve.InternalError),
    "an empty message": ([message(data=b"x")], optserve.InternalError),
    "another step": ([message(result=steps_pb2.Result(request_id="x", step=1))], optserve.InternalError),
    "a chunk": ([chunk(0, 0, bytes(16)).SerializeToString()], optserve.InternalError),
    "an error without a status": ([message(error=steps_pb2.StepError())], optserve.InternalError),
    "an error of another step": ([refusal(request_id="x").SerializeToString()], optserve.InternalError),
    "a refusal": ([refusal().SerializeToString()], optserve.AbortedError),
    "a packet that is too long": ([bytes((64 << 10) + 1)], CLOSED),
    "the end": ([None], CLOSED),
    "silence": ([], LATE),
    "chunks without end": (
        itertools.repeat(chunk(0, 0, bytes(16)).SerializeToString(), 1_000),
        optserve.InternalError,
    ),
}


@pytest.mark.parametrize("label", PACKETS)
def test_a_control_socket_that_answers_garbage_is_a_typed_error_in_time(evil, label):
    packets, error = PACKETS[label]
    out = taking()
    with closing(EvilSocket(lambda request: packets)) as control:
        evil.share(control.name)
        with optserve.connect(evil.target, HURRIED if error in (LATE, CLOSED) else PATIENT) as client:
            opt = client.optimizer("m")
            began = time.monotonic()
            with pytest.raises(error):
                opt.step(GRADIENTS, out=out)
            assert time.monotonic() - began < LATEST_S
            assert is_untouched(out)
            evil.reset()
            assert is_right(client.optimizer("m", transport="grpc").step(GRADIENTS, out=out))


@pytest.mark.parametrize(
    "twist",
    [
        fields("result", request_id="x"),
        fields("result", step=9),
        lambda right: [chunk(0, 0, bytes(16)), *right],
        answering(b"\xff"),
    ],
    ids=["another step", "a later step", "a chunk", "no message"],
)
def test_an_answer_to_a_step_in_shared_memory_is_checked_too(evil, twist):
    evil.share()
    out = taking()
    with optserve.connect(evil.target, PATIENT) as client:
        opt = client.optimizer("m", transport="shm")
        evil.twist = "step", twist
        with pytest.raises(optserve.InternalError):
            opt.step(GRADIENTS, out=out)
        assert is_untouched(out)


def mutated(rng: random.Random) -> Callable[[list], list[bytes]]:
    """The right answers with a few bytes changed, or messages twice, missing or in another order."""

    def twist(answers: list) -> list[bytes]:
        found = [answer.SerializeToString() for answer in answers]
        for _ in range(rng.randint(1, 3)):
            which = rng.randrange(len(found))
            raw = bytearray(found[which])
            at = rng.randrange(len(raw) + 1)
            change = rng.randrange(7)
            if change == 0:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            elif change == 1:
                del raw[at : at + rng.randint(1, 4)]
            elif change == 2:
                raw[at:at] = rng.randbytes(rng.randint(1, 12))
            elif change == 3:
                raw[at : at + 10] = b"\xff" * 9 + b"\x01"
            elif change == 4:
                found.insert(rng.randrange(len(found) + 1), found[which])
            elif change == 5 and len(found) > 1:
                found.append(found.pop(which))
            else:
                raw += raw[at:]
            found[min(which, len(found) - 1)] = (
                bytes(raw) if change not in (4, 5) else found[min(which, len(found) - 1)]
            )
        return found

    return twist


def test_every_call_of_the_client_has_a_row():
    calls = set(service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].methods_by_name)
    # Clients in other languages make steps by unary calls.
    assert {*METHODS} - {"open", "step"} == calls - {"StreamSteps", "ApplyGradients"}


@pytest.mark.parametrize("method", METHODS)
def test_a_mutated_answer_is_taken_or_a_typed_error(evil, clients, method):
    seconds = time.monotonic() + 0.7
    ended = 0
    for seed in range(MUTATIONS):
        evil.reset()
        call = prepared(METHODS[method], clients[True], taking())
        evil.twist = method, mutated(random.Random(f"{method} {seed}"))
        # Anything else than an answer or one of these errors fails the test, and says the seed.
        try:
            call()
        except optserve.OptserveError:
            ended += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        # A deadline that runs out takes its time; a busy machine does fewer.
        if time.monotonic() > seconds and seed > MUTATIONS // 10:
            break
    assert ended


TALKS = {
    "the end": lambda end: end.shutdown(socket.SHUT_RDWR),
    "silence": lambda end: None,
    "a banner": lambda end: end.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a web page": lambda end: end.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"),
    "zeros": lambda end: end.sendall(bytes(1000)),
    "a frame that is too long": lambda end: end.sendall(bytes(3 * [0xFF] + [0, 4] + 5 * [0])),
}


@pytest.mark.parametrize("label", TALKS)
def test_what_does_not_speak_http2_is_a_typed_error_in_time(label):
    listener = socket.create_server(("127.0.0.1", 0))
    ends = []

    def talk() -> None:
        with suppress(OSError):
            while True:
                ends.append(listener.accept()[0])
                TALKS[label](ends[-1])

    threading.Thread(target=talk, daemon=True).start()
    try:
        began = time.monotonic()
        with pytest.raises((optserve.UnavailableError, optserve.DeadlineExceededError)):
            optserve.connect(f"127.0.0.1:{listener.getsockname()[1]}", HURRIED)
        assert time.monotonic() - began < LATEST_S
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        for end in (listener, *ends):
            end.close()
