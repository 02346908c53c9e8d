"""Hosted mode: the server holds the parameters x as well."""

import itertools
import threading

import grpc
import numpy as np
import pytest

import optserve
from backend_under_test import BACKEND, BACKENDS
from optserve._common import wire
from optserve.v1 import optimizer_pb2, replicas_pb2, service_pb2, service_pb2_grpc, steps_pb2
from service.wire_client import begin, chunk, commit, create, details, refused, stream

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
INVALID = grpc.StatusCode.INVALID_ARGUMENT
MODEL = {"w": ((40, 30), "float32"), "b": ((7,), "float64"), "empty": ((0, 3), "float32"), "v": ((5,), "float32")}


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in MODEL.items()}


def bits(values: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in values.items()}


@pytest.fixture
def params() -> dict[str, np.ndarray]:
    return arrays(0)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("durable", [False, True], ids=["memory", "journal"])
def test_the_parameters_are_those_that_a_client_in_delta_mode_would_have(tmp_path, params, transport, durable):
    with (
        optserve.local_server(tmp_path if durable else None, backend=BACKEND) as server,
        optserve.connect(server.target) as client,
    ):
        delta = client.create_optimizer("delta", optserve.Adadelta(), params)
        client.create_optimizer("hosted", optserve.Adadelta(), params, hosted=True)
        hosted = client.optimizer("hosted", transport=transport)
        assert hosted.hosted
        assert not delta.hosted
        x = {name: param.copy() for name, param in params.items()}
        for step in range(12):
            updates = delta.step(arrays(step))
            for name, update in updates.items():
                x[name] += update
            wanted = ("parameters", "updates", "nothing")[step % 3]
            reply = hosted.step(arrays(step), reply=wanted)
            assert bits(reply) == {"parameters": bits(x), "updates": bits(updates), "nothing": {}}[wanted]
            pulled = hosted.pull_parameters()
            assert pulled.step == step + 1
            assert bits(pulled.arrays) == bits(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_is_decoupled_by_group_and_changeable(tmp_path, params, backend):
    with optserve.local_server(backend=backend) as server, optserve.connect(server.target) as client:
        groups = [optserve.Group(["b"], weight_decay=0.0), optserve.Group(["v"], {"rho": 0.5}, weight_decay=0.5)]
        opt = client.create_optimizer("a", optserve.Adadelta(), params, hosted=True, weight_decay=0.25, groups=groups)
        assert opt.weight_decay == 0.25
        assert [group.weight_decay for group in opt.groups] == [0.0, 0.5]
        x = {name: param.copy() for name, param in params.items()}
        decay = {"w": 0.25, "b": 0.0, "empty": 0.25, "v": 0.5}
        for step in range(3):
            updates = opt.step(arrays(step))
            x = {name: param + (updates[name] - decay[name] * param) for name, param in x.items()}
        assert bits(opt.pull_parameters().arrays) == bits(x)
        opt.update(weight_decay=0.0)
        updates = opt.step(arrays(3))
        x["w"] += updates["w"]
        assert opt.pull_parameters(["w"]).arrays["w"].tobytes() == x["w"].tobytes()


@pytest.mark.parametrize("decay", [1e-8, 1e-6, 1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_weight_decay_is_as_large_in_float32_as_it_is_said_to_be(backend, decay):
    """On the mean of many elements, as each is rounded."""
    rng = np.random.default_rng(7)
    x = {"w": rng.uniform(1.0, 2.0, 1_000_000).astype(np.float32)}
    grads = {"w": rng.uniform(-1e-3, 1e-3, x["w"].size).astype(np.float32)}
    with optserve.local_server(backend=backend) as server, optserve.connect(server.target) as client:
        opt = client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), x, hosted=True, weight_decay=decay)
        after = opt.step(grads, reply="parameters")["w"].astype(np.float64)
    taken = x["w"].astype(np.float64) - grads["w"] - after
    assert taken.mean() == pytest.approx(decay * x["w"].mean(dtype=np.float64), rel=0.05)


def test_weight_decay_is_divided_with_the_learning_rate_of_a_stale_gradient(client, name):
    x, still = {"w": np.ones(2)}, {"w": np.zeros(2)}
    client.create_optimizer(
        name, optserve.Sgd(), x, hosted=True, weight_decay=0.5, consistency=optserve.Async(scale_by_staleness=True)
    )
    with client.worker(name, "quick") as quick, client.worker(name, "slow") as slow:
        slow.pull()
        quick.pull()
        assert quick.step(still)["w"][0] == 0.5
        # One step old: half of the half is taken.
        assert slow.step(still)["w"][0] == 0.5 - 0.25 * 0.5


def test_a_replayed_step_answers_with_the_same_parameters_and_changes_nothing(stub, name):
    made = create(stub, name, {"x": (4,)}, mode=optimizer_pb2.MODE_HOSTED)
    push(stub, made.name, np.ones(4, np.float32))
    with stream(stub, made.name) as first:
        first.send(
            begin("one", reply=steps_pb2.REPLY_PARAMETERS), chunk(0, 0, np.ones(4, np.float32).tobytes()), commit()
        )
        payload, result = first.reply()
    with stream(stub, made.name) as second:
        for reply, expected in ((steps_pb2.REPLY_PARAMETERS, payload), (steps_pb2.REPLY_NOTHING, b"")):
            second.send(begin("one", reply=reply), commit())
            again, replayed = second.reply()
            assert again == expected
            assert replayed.replayed
            assert replayed.step == result.step == 1
        # Also when the updates are gone, because another gradient has begun to take their place.
        second.send(begin("two"), chunk(0, 0, bytes(4)), steps_pb2.StreamStepsRequest(abort=steps_pb2.Abort()))
        second.send(begin("one", reply=steps_pb2.REPLY_PARAMETERS), commit())
        assert second.reply()[0] == payload
        second.send(begin("one"))
        assert details(second.error())[0] == "REPLY_GONE"


def test_a_unary_step_can_ask_for_the_parameters_or_for_nothing(stub, name):
    made = create(stub, name, {"x": (4,)}, mode=optimizer_pb2.MODE_HOSTED)
    push(stub, made.name, np.ones(4, np.float32))
    gradient = steps_pb2.Tensor(name="x", data=np.ones(4, np.float32).tobytes())
    request = steps_pb2.ApplyGradientsRequest(name=made.name, request_id="one", gradients=[gradient])
    updates = np.frombuffer(stub.ApplyGradients(request).updates[0].data, np.float32)
    request.reply = steps_pb2.REPLY_PARAMETERS
    x = np.frombuffer(stub.ApplyGradients(request).updates[0].data, np.float32)
    assert x.tobytes() == (1 + updates).tobytes()
    request.reply = steps_pb2.REPLY_NOTHING
    nothing = stub.ApplyGradients(request)
    assert not nothing.updates
    assert nothing.result.replayed


def push(stub, name: str, x: np.ndarray, request_id: str = "push", **options):
    messages = [
        replicas_pb2.PushParametersRequest(name=name, request_id=request_id, **options),
        replicas_pb2.PushParametersRequest(chunk=steps_pb2.Chunk(), data=x.tobytes()),
        replicas_pb2.PushParametersRequest(commit=steps_pb2.Commit()),
    ]
    return stub.PushParameters(iter(messages))


def pull(stub, name: str, **options) -> tuple[replicas_pb2.PullParametersResponse, bytes]:
    first, *rest = stub.PullParameters(replicas_pb2.PullParametersRequest(name=name, **options))
    return first, b"".join(message.data for message in rest)


def test_parameters_are_uploaded_once_and_a_retry_is_harmless(stub, name):
    made = create(stub, name, {"x": (4,)}, mode=optimizer_pb2.MODE_HOSTED)
    with refused(FAILED_PRECONDITION, "PARAMETERS_MISSING"):
        pull(stub, made.name)
    with stream(stub, made.name) as steps:
        steps.send(begin())
        assert details(steps.error())[0] == "PARAMETERS_MISSING"
    x = np.arange(4, dtype=np.float32)
    push(stub, made.name, x)
    push(stub, made.name, x)
    with refused(FAILED_PRECONDITION, "PARAMETERS_IN_PLACE"):
        push(stub, made.name, -x, request_id="another")
    assert pull(stub, made.name)[1] == x.tobytes()


def test_an_upload_that_ends_without_commit_or_is_bad_changes_nothing(stub, name):
    made = create(stub, name, {"x": (4,)}, mode=optimizer_pb2.MODE_HOSTED)
    start = replicas_pb2.PushParametersRequest(name=made.name, request_id="one")
    whole = replicas_pb2.PushParametersRequest(chunk=steps_pb2.Chunk(), data=bytes(16))
    end = replicas_pb2.PushParametersRequest(commit=steps_pb2.Commit())

    def change(message, **fields):
        changed = type(message)()
        changed.CopyFrom(message)
        for field, value in fields.items():
            setattr(changed, field, value)
        return changed

    def piece(**place):
        return replicas_pb2.PushParametersRequest(chunk=steps_pb2.Chunk(**place))

    poisoned = np.array([1, np.nan, 0, 0], np.float32).tobytes()
    cases = [
        ([], "INVALID_FIELD", "name"),
        ([start, whole], "INVALID_FIELD", "commit"),
        ([start, end], "MISSING_CHUNK", "chunk"),
        ([start, whole, whole, end], "OVERLAPPING_CHUNK", "chunk.offset"),
        ([start, change(whole, data=poisoned), end], "NON_FINITE_VALUE", "data"),
        ([start, change(whole, data=bytes(20)), end], "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
        ([start, piece(tensor=3), end], "UNKNOWN_PARAMETER", "chunk.tensor"),
        ([start, piece(operand=1), end], "INVALID_FIELD", "chunk.operand"),
        ([start, replicas_pb2.PushParametersRequest(data=b"x"), end], "INVALID_FIELD", "chunk"),
        ([change(start, request_id=""), whole, end], "INVALID_FIELD", "request_id"),
        ([change(start, wire_type=9), whole, end], "WRONG_DATA_TYPE", "wire_type"),
    ]  # fmt: skip
    for messages, reason, field in cases:
        with refused(INVALID, reason, field):
            stub.PushParameters(iter(messages))
    with refused(FAILED_PRECONDITION, "PARAMETERS_MISSING"):
        pull(stub, made.name)
    # Larger than a gradient could be: its square overflows, and nobody squares it.
    large = np.full(4, 1e30, np.float32)
    push(stub, made.name, large)
    assert pull(stub, made.name)[1] == large.tobytes()


def test_in_delta_mode_there_are_no_parameters(stub, name):
    made = create(stub, name, {"x": (4,)})
    with refused(FAILED_PRECONDITION, "NOT_HOSTED", "name"):
        push(stub, made.name, np.ones(4, np.float32))
    with refused(FAILED_PRECONDITION, "NOT_HOSTED", "name"):
        pull(stub, made.name)
    with stream(stub, made.name) as steps:
        for reply in (steps_pb2.REPLY_PARAMETERS, steps_pb2.REPLY_NOTHING):
            steps.send(begin(reply=reply), commit())
            reason, _, field, _ = details(steps.error())
            assert (reason, field) == ("NOT_HOSTED", "begin.reply")
    settings = optimizer_pb2.Optimizer(name=made.name, weight_decay=0.1)
    with refused(INVALID, "INVALID_FIELD", "optimizer.weight_decay"):
        stub.UpdateOptimizer(
            service_pb2.UpdateOptimizerRequest(optimizer=settings, update_mask={"paths": ["weight_decay"]})
        )


def test_only_what_is_newer_and_only_what_is_wanted_is_pulled(client, name, params):
    opt = client.create_optimizer(name, optserve.Sgd(), params, hosted=True)
    assert opt.pull_parameters(newer_than=0) is None
    opt.step(arrays(1), reply="nothing")
    assert opt.pull_parameters(newer_than=1) is None
    out = {"v": np.empty(5, np.float32)}
    pulled = opt.pull_parameters(["v"], newer_than=0, out=out)
    assert pulled.step == 1
    assert list(pulled.arrays) == ["v"]
    assert pulled.arrays["v"] is out["v"]
    with pytest.raises(optserve.InvalidArgumentError, match="no parameter 'u'"):
        opt.pull_parameters(["u"])


def test_parameters_travel_in_halves_if_the_client_wants(client, name):
    x = {"x": np.array([1.0, 1.00390625, 3.1415927], np.float32)}
    client.create_optimizer(name, optserve.Sgd(), x, hosted=True)
    opt = client.optimizer(name, wire_dtype="bfloat16")
    assert opt.pull_parameters().arrays["x"].tolist() == [1.0, 1.0, 3.140625]
    assert opt.step({"x": np.zeros(3, np.float32)}, reply="parameters")["x"].tolist() == [1.0, 1.0, 3.140625]


def test_what_is_pulled_is_of_one_step_while_others_step(server, name):
    size = 3_000_000
    with optserve.connect(server.target) as client, optserve.connect(server.target) as other:
        opt = client.create_optimizer(
            name, optserve.Sgd(learning_rate=1.0), {"x": np.zeros(size, np.float32)}, hosted=True
        )
        stop = threading.Event()

        def step() -> None:
            ones = {"x": np.full(size, -1, np.float32)}
            while not stop.is_set():
                opt.step(ones, reply="nothing")

        thread = threading.Thread(target=step)
        thread.start()
        try:
            reader = other.optimizer(name)
            seen = set()
            while len(seen) < 10:
                found = reader.pull_parameters()
                assert found is not None
                assert np.all(found.arrays["x"] == found.step)
                seen.add(found.step)
        finally:
            stop.set()
            thread.join()


def test_copies_on_their_way_are_bounded_and_whoever_comes_late_is_told_to_come_back(tmp_path):
    config = tmp_path / "optserve.toml"
    config.write_text("max_pull_bytes = 50000000\n")
    size = 12_000_000  # more than gRPC takes from a sender while nobody reads
    with (
        optserve.local_server(options=["--config", str(config)]) as server,
        optserve.connect(server.target) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        opt = client.create_optimizer("a", optserve.Sgd(), {"x": np.zeros(size, np.float32)}, hosted=True)
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        request = replicas_pb2.PullParametersRequest(name="optimizers/a")
        unread = stub.PullParameters(request)
        assert next(iter(unread)).step == 0
        # The same step shares the copy; another one has no room.
        assert len(list(stub.PullParameters(request))) > 1
        opt.step({"x": np.ones(size, np.float32)}, reply="nothing")
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "REPLIES_FULL") as seen:
            list(stub.PullParameters(request))
        assert (seen["retry_s"], seen["metadata"]) == (1.0, {"limit_bytes": "50000000"})
        unread.cancel()
        pulled = opt.pull_parameters()
        assert pulled.step == 1


def test_a_client_that_does_not_read_its_pull_is_cut_off(tmp_path):
    config = tmp_path / "optserve.toml"
    # Long enough for a busy machine between two messages of an upload.
    config.write_text("max_pull_bytes = 50000000\nidle_step_s = 2.0\n")
    size = 12_000_000
    with (
        optserve.local_server(options=["--config", str(config)]) as server,
        optserve.connect(server.target) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        opt = client.create_optimizer("a", optserve.Sgd(), {"x": np.zeros(size, np.float32)}, hosted=True)
        request = replicas_pb2.PullParametersRequest(name="optimizers/a")
        unread = service_pb2_grpc.OptimizerServiceStub(channel).PullParameters(request)
        assert next(iter(unread)).step == 0
        opt.step({"x": np.ones(size, np.float32)}, reply="nothing")
        # There is no room for a second copy before the first is given up.
        assert opt.pull_parameters().step == 1
        with pytest.raises(grpc.RpcError):
            list(unread)


def test_an_upload_that_was_taken_over_is_made_again(server, client, stub, name, monkeypatch):
    x, encode, chunks = {"x": np.arange(2_000_000, dtype=np.float32)}, wire.encode, itertools.count()
    begun = []

    def disturbed(header, *parts):
        if parts and next(chunks) == 1:
            # As when the connection was lost and another try has begun: the same upload, which ends before its commit.
            with pytest.raises(grpc.RpcError):
                stub.PushParameters(iter(begun))
        elif not parts:
            begun.append(header)
        return encode(header, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(wire, "encode", disturbed)
        opt = client.create_optimizer(name, optserve.Sgd(), x, hosted=True)
    assert bits(opt.pull_parameters().arrays) == bits(x)


def test_state_and_checkpoints_hold_the_parameters(client, name, params):
    opt = client.create_optimizer(name, optserve.Adadelta(), params, hosted=True, weight_decay=0.125)
    opt.step(arrays(1))
    opt.save_checkpoint("one")
    x, state = opt.pull_parameters(), opt.export_state()
    assert bits({key: slots["parameter"] for key, slots in state.slots.items()}) == bits(x.arrays)
    expected = opt.step(arrays(2), reply="parameters")
    opt.restore_checkpoint("one")
    assert bits(opt.pull_parameters().arrays) == bits(x.arrays)
    assert bits(opt.step(arrays(2), reply="parameters")) == bits(expected)
    twin = client.create_optimizer(f"{name}-twin", optserve.Adadelta(), params, hosted=True, weight_decay=0.125)
    twin.import_state(state)
    assert bits(twin.step(arrays(2), reply="parameters")) == bits(expected)
    delta = client.create_optimizer(f"{name}-delta", optserve.Adadelta(), params)
    with pytest.raises(optserve.InvalidArgumentError, match="parameter"):
        delta.import_state(state)


def test_a_state_file_holds_them_too(client, name, params, tmp_path):
    opt = client.create_optimizer(name, optserve.Adadelta(), params, hosted=True)
    opt.step(arrays(1))
    opt.export_state().save(tmp_path / "state.safetensors")
    state = optserve.OptimizerState.load(tmp_path / "state.safetensors")
    assert bits({key: slots["parameter"] for key, slots in state.slots.items()}) == bits(opt.pull_parameters().arrays)


def test_specs_reserve_the_place_for_an_upload_by_somebody_else(client, name, params):
    specs = {key: optserve.TensorSpec(shape, dtype) for key, (shape, dtype) in MODEL.items()}
    opt = client.create_optimizer(name, optserve.Adadelta(), specs, hosted=True)
    with pytest.raises(optserve.FailedPreconditionError, match="not been uploaded"):
        opt.step(arrays(1))
    client.optimizer(name).push_parameters(params)
    with pytest.raises(optserve.FailedPreconditionError, match="already uploaded"):
        opt.push_parameters(params)
    assert bits(opt.pull_parameters().arrays) == bits(params)
    opt.step(arrays(1))


def test_its_memory_is_that_of_the_state_and_the_parameters(stub, name):
    made = create(stub, name, {"x": (1000,)}, mode=optimizer_pb2.MODE_HOSTED)
    assert made.mode == optimizer_pb2.MODE_HOSTED
    assert made.memory_bytes == 4 * 4000  # two slots, staging, x


@pytest.mark.parametrize("killed", [True, False], ids=["from the journal", "from a snapshot"])
def test_everything_is_there_after_the_server_has_ended(tmp_path, params, killed):
    expected = {}
    with optserve.local_server(tmp_path, backend="numpy") as server, optserve.connect(server.target) as client:
        opt = client.create_optimizer("a", optserve.Adadelta(), params, hosted=True, weight_decay=0.5)
        awaited = client.create_optimizer("b", optserve.Adadelta(), {"x": optserve.TensorSpec((2,))}, hosted=True)
        for step in range(5):
            expected = opt.step(arrays(step), reply="parameters")
        if killed:
            server.process.kill()
            server.process.wait()
    with optserve.local_server(tmp_path, backend=BACKEND) as server, optserve.connect(server.target) as client:
        again = client.optimizer("a")
        assert again.weight_decay == 0.5
        assert bits(again.pull_parameters().arrays) == bits(expected)
        assert bits(again.replay(reply="parameters")) == bits(expected)
        awaited = client.optimizer("b")
        with pytest.raises(optserve.FailedPreconditionError):
            awaited.step({"x": np.ones(2, np.float32)})
        awaited.push_parameters({"x": np.ones(2, np.float32)})


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_impossible_weight_decay_is_refused(client, name, params, decay):
    with pytest.raises(optserve.InvalidArgumentError, match="weight_decay"):
        client.create_optimizer(name, optserve.Adadelta(), params, hosted=True, weight_decay=decay)
    group = optserve.Group(["w"], weight_decay=decay)
    with pytest.raises(optserve.InvalidArgumentError, match="weight_decay"):
        client.create_optimizer(name, optserve.Adadelta(), params, hosted=True, groups=[group])
