"""AddParameters as the contract says it, for a client in any language."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import optserve
from optserve.v1 import additions_pb2, optimizer_pb2, replicas_pb2, service_pb2, service_pb2_grpc, steps_pb2
from service.wire_client import begin, chunk, commit, create, details, refused, stream

Request = additions_pb2.AddParametersRequest

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ABORTED = grpc.StatusCode.ABORTED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MIB = 1 << 20
NEW = [
    optimizer_pb2.Parameter(name="c", shape=[2]),
    optimizer_pb2.Parameter(name="d", shape=[3], data_type=optimizer_pb2.DATA_TYPE_FLOAT64),
]
C, D = np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0, 5.0])


def first(name: str, request_id: str = "one", parameters=NEW, **options: Any) -> Request:
    return Request(name=name, request_id=request_id, parameters=parameters, **options)


def part(tensor: int, data: bytes, offset: int = 0) -> Request:
    return Request(chunk=steps_pb2.Chunk(tensor=tensor, offset=offset), data=data)


END = Request(commit=steps_pb2.Commit())


def add(stub, *requests: Request) -> optimizer_pb2.Optimizer:
    return stub.AddParameters(iter(requests), timeout=30).optimizer


def get(stub, name: str) -> optimizer_pb2.Optimizer:
    return stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=name)).optimizer


def hosted(stub, name: str) -> str:
    made = create(stub, name, {"a": (2,)}, mode=optimizer_pb2.MODE_HOSTED)
    push = replicas_pb2.PushParametersRequest
    requests = [
        push(name=made.name, request_id="p", chunk=steps_pb2.Chunk(), data=C.tobytes(), commit=steps_pb2.Commit())
    ]
    stub.PushParameters(iter(requests))
    return made.name


def pulled(stub, name: str) -> list[bytes]:
    request = replicas_pb2.PullParametersRequest(name=name)
    return [message.data for message in stub.PullParameters(request) if message.data]


def stepped(stub, name: str, request_id: str, *gradients: bytes, **options: Any) -> bytes:
    """The reply to a step of the first parameters on a stream of its own."""
    with stream(stub, name, **options) as opened:
        chunks = [chunk(tensor, 0, data) for tensor, data in enumerate(gradients)]
        return opened.step_when_free(begin(request_id), *chunks, commit())[0]


def test_they_come_behind_the_others_with_their_groups_and_nothing_else_changes(stub, name):
    made = create(stub, name, {"a": (2,), "b": (1,)})
    stepped(stub, made.name, "s", C.tobytes(), bytes(4))
    before = get(stub, made.name)
    group = optimizer_pb2.ParameterGroup(parameters=["d"])
    group.algorithm.adadelta.rho = 0.5
    after = add(stub, first(made.name, groups=[group], commit=steps_pb2.Commit()))
    assert [item.name for item in after.parameters] == ["a", "b", "c", "d"]
    assert [(list(group.parameters), group.algorithm.adadelta.rho) for group in after.groups] == [(["d"], 0.5)]
    assert (after.step, after.lineage, after.create_time) == (before.step, before.lineage, before.create_time)
    assert after.etag != before.etag
    # Three arrays of the new bytes: two slots, and the staging buffer.
    assert after.memory_bytes == before.memory_bytes + 3 * (C.nbytes + D.nbytes)
    assert get(stub, made.name) == after


def test_in_hosted_mode_x_comes_with_them_in_any_order_and_dtype(stub, name):
    full_name = hosted(stub, name)
    half = D.astype(np.float16).tobytes()
    requests = [
        first(full_name, wire_type=optimizer_pb2.DATA_TYPE_FLOAT16), part(1, half[2:], 2),
        part(0, C.astype(np.float16).tobytes()), part(1, half[:2]), END,
    ]  # fmt: skip
    add(stub, *requests)
    assert b"".join(pulled(stub, full_name)) == C.tobytes() + C.tobytes() + D.tobytes()


CASES = {
    "no message": ((), INVALID, "INVALID_FIELD", "name"),
    "no commit": ((first("N"), part(0, C.tobytes()), part(1, D.tobytes())), INVALID, "INVALID_FIELD", "commit"),
    "no parameters": ((first("N", parameters=[]), END), INVALID, "INVALID_FIELD", "parameters"),
    "no request id": ((first("N", ""), END), INVALID, "INVALID_FIELD", "request_id"),
    "a name that is taken": (
        (first("N", parameters=[NEW[0], optimizer_pb2.Parameter(name="a")]), END),
        INVALID, "DUPLICATE_PARAMETER", "parameters[1].name",
    ),
    "a name twice": ((first("N", parameters=NEW[:1] * 2), END), INVALID, "DUPLICATE_PARAMETER", "parameters[1].name"),
    "a dtype of the wire": (
        (first("N", parameters=[optimizer_pb2.Parameter(name="c", data_type=optimizer_pb2.DATA_TYPE_FLOAT16)]), END),
        INVALID, "WRONG_DATA_TYPE", "parameters[0].data_type",
    ),
    "a group of an old parameter": (
        (first("N", groups=[optimizer_pb2.ParameterGroup(parameters=["c", "a"])]), END),
        INVALID, "UNKNOWN_PARAMETER", "groups[0].parameters",
    ),
    "a group of no parameter": (
        (first("N", groups=[optimizer_pb2.ParameterGroup(parameters=["x"])]), END),
        INVALID, "UNKNOWN_PARAMETER", "groups[0].parameters",
    ),
    "a parameter in two groups": (
        (first("N", groups=[optimizer_pb2.ParameterGroup(parameters=["c"])] * 2), END),
        INVALID, "DUPLICATE_PARAMETER", "groups[1].parameters",
    ),
    "a weight decay out of range": (
        (first("N", groups=[optimizer_pb2.ParameterGroup(parameters=["c"], weight_decay=2)]),
         part(0, C.tobytes()), part(1, D.tobytes()), END),
        INVALID, "HYPERPARAMETER_OUT_OF_RANGE", "optimizer.weight_decay",
    ),
    "another etag": ((first("N", etag="x"), END), ABORTED, "ETAG_MISMATCH", "etag"),
    "another lineage": ((first("N", lineage="x"), END), ABORTED, "STATE_REPLACED", None),
    "too much memory": (
        (first("N", parameters=[optimizer_pb2.Parameter(name="c", shape=[1 << 50])]), END),
        EXHAUSTED, "MODEL_TOO_LARGE", "parameters",
    ),
    "x that is missing": ((first("N"), part(0, C.tobytes()), END), INVALID, "MISSING_CHUNK", "chunk"),
    "x twice": ((first("N"), part(0, C.tobytes()), part(0, C.tobytes()), END), INVALID, "OVERLAPPING_CHUNK",
                "chunk.offset"),
    "x of no parameter": ((first("N"), part(2, C.tobytes()), END), INVALID, "UNKNOWN_PARAMETER", "chunk.tensor"),
    "x beyond the end": ((first("N"), part(1, bytes(32)), END), INVALID, "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
    "half an element": ((first("N"), part(0, bytes(2)), END), INVALID, "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
    "NaN": ((first("N"), part(0, (C * np.nan).tobytes()), END), INVALID, "NON_FINITE_VALUE", "data"),
    "an operand": (
        (first("N"), Request(chunk=steps_pb2.Chunk(operand=steps_pb2.OPERAND_GRADIENT), data=C.tobytes()), END),
        INVALID, "INVALID_FIELD", "chunk.operand",
    ),
    "data without a place": ((first("N"), Request(data=C.tobytes()), END), INVALID, "INVALID_FIELD", "chunk"),
}  # fmt: skip


@pytest.mark.parametrize(("requests", "code", "reason", "field"), CASES.values(), ids=list(CASES))
def test_a_bad_call_is_refused_as_a_whole(stub, name, requests, code, reason, field):
    full_name = hosted(stub, name)
    before, x = get(stub, full_name), pulled(stub, full_name)
    messages = []
    for request in requests:
        messages.append(Request())
        messages[-1].CopyFrom(request)
        messages[-1].name = full_name if request.name else ""
    with refused(code, reason, field):
        add(stub, *messages)
    assert get(stub, full_name) == before
    assert pulled(stub, full_name) == x
    # The same id is still free.
    add(stub, first(full_name), part(0, C.tobytes()), part(1, D.tobytes()), END)


def test_in_delta_mode_there_is_no_x(stub, name):
    full_name = create(stub, name, {"a": (2,)}).name
    with refused(PRECONDITION, "NOT_HOSTED", "chunk"):
        add(stub, first(full_name), part(0, C.tobytes()), END)
    assert len(get(stub, full_name).parameters) == 1


def test_before_the_parameters_are_uploaded_none_are_added(stub, name):
    full_name = create(stub, name, {"a": (2,)}, mode=optimizer_pb2.MODE_HOSTED).name
    with refused(PRECONDITION, "PARAMETERS_MISSING"):
        add(stub, first(full_name), part(0, C.tobytes()), part(1, D.tobytes()), END)


def test_the_same_id_a_second_time_changes_nothing_and_stands_for_its_request(stub, name):
    full_name = hosted(stub, name)
    after = add(stub, first(full_name), part(0, C.tobytes()), part(1, D.tobytes()), END)
    stepped(stub, full_name, "s", C.tobytes(), C.tobytes(), D.tobytes())
    # Without x, and with an etag that has changed since: it is not looked at again.
    again = add(stub, first(full_name, etag="old"), END)
    assert again.etag == after.etag
    assert len(again.parameters) == 3
    with refused(INVALID, "REQUEST_ID_REUSED", "request_id"):
        add(stub, first(full_name, parameters=NEW[:1]), END)
    with refused(INVALID, "REQUEST_ID_REUSED", "request_id"):
        add(stub, first(full_name, parameters=[NEW[0], optimizer_pb2.Parameter(name="d", shape=[3])]), END)


def test_a_stream_that_was_opened_before_goes_on_with_the_parameters_that_it_knows(stub, name):
    """Also in its retries, and on the next stream of a client that says how many it knows."""
    full_name, twin = create(stub, name, {"a": (2,), "b": (1,)}).name, create(stub, f"{name}-b", {"a": (2,), "b": (1,)})
    b, payload = np.ones(1, np.float32).tobytes(), b""
    with stream(stub, full_name) as old, stream(stub, twin.name) as calm:
        for number in range(3):
            if number == 1:
                add(stub, first(full_name, commit=steps_pb2.Commit()))
            steps = [begin(f"step-{number}"), chunk(0, 0, C.tobytes() + b), commit()]
            payload, result = old.step_when_free(*steps)
            assert (payload, result.step) == (calm.step_when_free(*steps)[0], number + 1)
        old.send(begin("step-2"), commit())
        again, result = old.reply()
        assert (again, result.replayed) == (payload, True)
        old.send(begin("more", tensors=[0, 2]))
        reason, metadata, field, _ = details(old.error())
        assert (reason, metadata["parameter"], field) == ("UNKNOWN_PARAMETER", "2", "begin.tensors")
    with stream(stub) as later:
        opened = later.open(full_name, parameter_count=2)
        assert (opened.last_request_id, opened.last_tensors) == ("step-2", [0, 1])
        payload, _ = later.step_when_free(begin("step-3"), chunk(0, 0, C.tobytes() + b), commit())
    assert payload == stepped(stub, twin.name, "step-3", C.tobytes(), b)
    # One that says nothing takes all of them.
    with stream(stub, full_name) as new:
        new.send(begin("step-4"), chunk(0, 0, C.tobytes() + b), commit())
        reason, metadata, _, _ = details(new.error())
        assert (reason, metadata["parameter"]) == ("MISSING_CHUNK", "c")
        new.send(begin("step-4"), chunk(0, 0, C.tobytes() + b + C.tobytes()), chunk(3, 0, D.tobytes()), commit())
        _, result = new.reply()
        assert result.step == 5


def test_the_last_step_is_shown_as_far_as_a_stream_knows_its_parameters(stub, name):
    full_name = create(stub, name, {"a": (2,), "b": (1,)}).name
    add(stub, first(full_name, commit=steps_pb2.Commit()))
    with stream(stub, full_name) as opened:
        opened.step_when_free(begin("s", tensors=[2, 0]), chunk(2, 0, C.tobytes() * 2), commit())
        updates, _ = opened.step_when_free(begin("t", tensors=[3]), chunk(3, 0, D.tobytes()), commit())
        assert len(updates) == D.nbytes
    with stream(stub) as old:
        assert list(old.open(full_name, parameter_count=2).last_tensors) == []
        old.send(begin("t"), commit())
        assert details(old.error())[0] == "REPLY_GONE"
    with stream(stub, full_name) as opened:
        whole, _ = opened.step_when_free(begin("u"), chunk(0, 0, C.tobytes() + bytes(4) + C.tobytes()),
                                         chunk(3, 0, D.tobytes()), commit())  # fmt: skip
    with stream(stub) as old:
        assert list(old.open(full_name, parameter_count=2).last_tensors) == [0, 1]
        old.send(begin("u"), commit())
        assert old.reply()[0] == whole[:12]


def test_a_client_that_knows_more_parameters_than_there_are_knows_another_state(stub, name):
    full_name = create(stub, name, {"a": (2,)}).name
    with stream(stub) as opened:
        opened.open(full_name, parameter_count=2)
        opened.send(begin("s"), chunk(0, 0, C.tobytes()), commit())
        assert details(opened.error())[0] == "STATE_REPLACED"


def test_a_step_under_way_is_not_disturbed(stub, name):
    full_name = create(stub, name, {"a": (2,)}).name
    with stream(stub, full_name) as opened:
        opened.send(begin("s"), chunk(0, 0, C.tobytes()))
        with stream(stub, full_name) as other:
            # Once its begin is answered, the first step is under way.
            other.send(begin("t"))
            assert details(other.error())[0] == "STEP_IN_PROGRESS"
        # It waits for the end of that step, for half of the time that the call has.
        with refused(ABORTED, "STEP_IN_PROGRESS") as seen:
            stub.AddParameters(iter([first(full_name, commit=steps_pb2.Commit())]), timeout=2)
        assert seen["retry_s"]
        opened.send(commit())
        assert opened.reply()[1].step == 1
    assert len(get(stub, full_name).parameters) == 1


def test_it_comes_between_two_steps_of_a_client_that_makes_no_pause(stub, name):
    full_name = hosted(stub, name)
    answers = list[Any]()

    def messages(turn: int, sent: threading.Event) -> Iterator[Request]:
        yield first(full_name, f"r{turn}", [optimizer_pb2.Parameter(name=f"p{turn}", shape=[2])])
        yield part(0, C.tobytes())
        yield END
        sent.set()

    def add_to_it(turn: int, sent: threading.Event) -> None:
        answers.append(stub.AddParameters(messages(turn, sent), timeout=30))

    with stream(stub, full_name, parameter_count=1) as opened:
        for turn in range(20):
            sent = threading.Event()
            thread = threading.Thread(target=add_to_it, args=(turn, sent))
            opened.send(begin(), chunk(0, 0, C.tobytes()))
            thread.start()
            sent.wait(30)
            while thread.is_alive():
                # The next step begins as soon as this one has ended.
                opened.send(commit(), begin(), chunk(0, 0, C.tobytes()))
                opened.reply()
            opened.send(commit())
            opened.reply()
            assert len(answers) == turn + 1
    assert len(get(stub, full_name).parameters) == 21


def test_while_workers_are_alive_a_call_is_refused_before_it_brings_values(stub, client, name):
    x, done = {"a": np.ones(2, np.float32)}, threading.Event()
    client.create_optimizer(name, optserve.Sgd(), x, hosted=True, consistency=optserve.Async())

    def messages() -> Iterator[Request]:
        yield first(f"optimizers/{name}")
        done.wait(30)

    with client.worker(name, "alice"), refused(PRECONDITION, "WORKERS_ATTACHED", "name"):
        stub.AddParameters(messages(), timeout=20)
    done.set()


def test_while_workers_are_alive_none_are_added(stub, client, name):
    x = {"a": np.ones(2, np.float32)}
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), x, hosted=True, consistency=optserve.Async())
    parameters = [first(f"optimizers/{name}"), part(0, C.tobytes()), part(1, D.tobytes()), END]
    with client.worker(name, "alice") as worker:
        worker.pull()
        worker.step(x)
        with refused(PRECONDITION, "WORKERS_ATTACHED", "name") as seen:
            add(stub, *parameters)
        assert "add parameters when they have left" in seen["message"]
    add(stub, *parameters)
    everything = x | {"c": C, "d": D}
    # Their numbers, and the replies of their last steps, are of the parameters that there were.
    with client.worker(name, "alice") as worker:
        pulled = worker.pull()
        assert set(pulled.arrays) == set(everything)
        after = worker.step(everything)
        assert np.array_equal(after["d"], D - D)
        assert np.array_equal(after["a"], pulled.arrays["a"] - x["a"])
    assert opt.pull_parameters().step == 2


def test_uploads_at_the_same_time_are_all_added_once(stub, name):
    """Two with one id, of which one is a retry, and others; each is held up before its commit until all are there."""
    full_name = hosted(stub, name)
    everyone = threading.Barrier(6)

    def messages(request_id: str) -> Iterator[Request]:
        yield first(full_name, request_id, [optimizer_pb2.Parameter(name=request_id, shape=[2])])
        yield part(0, C.tobytes())
        everyone.wait(30)
        yield END

    answers: list[Any] = []
    ids = ["one", "one", "two", "three", "four", "five"]
    threads = [
        threading.Thread(target=lambda i=i: answers.append(stub.AddParameters(messages(i), timeout=30))) for i in ids
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == len(ids)
    names = [item.name for item in get(stub, full_name).parameters]
    assert names[0] == "a"
    assert sorted(names[1:]) == sorted(set(ids))
    assert pulled(stub, full_name) == [C.tobytes() * 6]


@pytest.mark.parametrize("mode", [optimizer_pb2.MODE_DELTA, optimizer_pb2.MODE_HOSTED])
def test_the_limits_of_the_server_hold_for_all_parameters_together(tmp_path, mode):
    config = tmp_path / "optserve.toml"
    config.write_text(f"max_parameters = 3\nmax_parameter_bytes = {8 * MIB}\nmax_state_bytes = {20 * MIB}\n")
    with (
        optserve.local_server(backend="numpy", options=["--config", str(config)]) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        full_name = create(stub, "a", {"a": (2,)}).name if mode == optimizer_pb2.MODE_DELTA else hosted(stub, "a")

        def parameter(megabytes: int, name: str = "c") -> optimizer_pb2.Parameter:
            return optimizer_pb2.Parameter(name=name, shape=[megabytes * MIB // 4])

        four = [parameter(0, str(number)) for number in range(4)]
        with refused(EXHAUSTED, "MODEL_TOO_LARGE", "parameters"):
            add(stub, first(full_name, parameters=four, commit=steps_pb2.Commit()))
        with refused(EXHAUSTED, "MODEL_TOO_LARGE", "parameters"):
            add(stub, first(full_name, parameters=four[:3], commit=steps_pb2.Commit()))
        with refused(EXHAUSTED, "MODEL_TOO_LARGE", "parameters"):
            add(stub, first(full_name, parameters=[parameter(9)], commit=steps_pb2.Commit()))
        x = [part(0, bytes(MIB), offset) for offset in range(0, 7 * MIB, MIB)]
        with refused(EXHAUSTED, "SERVER_FULL") as seen:
            add(
                stub,
                first(full_name, parameters=[parameter(7)]),
                *(x if mode == optimizer_pb2.MODE_HOSTED else ()),
                END,
            )
        assert "max_state_bytes" in seen["message"]
        # What was refused is not counted any more.
        add(
            stub,
            first(full_name, parameters=[parameter(2)]),
            *(x[:2] if mode == optimizer_pb2.MODE_HOSTED else ()),
            END,
        )
        assert len(get(stub, full_name).parameters) == 2
