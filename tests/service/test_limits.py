"""What one request may make the server do, hold and answer: each has a limit, and costs no more than its size."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

import optserve
from optserve._common import machine, wire
from optserve.v1 import (
    algorithms_pb2,
    checkpoints_pb2,
    optimizer_pb2,
    service_pb2,
    service_pb2_grpc,
    statistics_pb2,
    steps_pb2,
)
from optserve.v1.steps_pb2 import StreamStepsRequest as Request
from service.wire_client import begin, create, refused, stream

DATA_TYPES = optimizer_pb2.DATA_TYPE_FLOAT32, optimizer_pb2.DATA_TYPE_FLOAT64

MIB = 1 << 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
SGD = algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd())


def statistics(stub, **query):
    return stub.GetStatistics(statistics_pb2.GetStatisticsRequest(**query), timeout=30)


def test_statistics_are_counted_before_anything_is_made_for_them(stub, name):
    """169 bytes took 2.4 GiB: a tensor listed 150 times was copied 150 times."""
    full_name = create(stub, name, {"x": (1 << 20,), "y": (2,)}).name
    with refused(INVALID, "DUPLICATE_PARAMETER", "tensors"):
        statistics(stub, name=full_name, tensors=[0] * 150)
    with refused(INVALID, "UNKNOWN_PARAMETER", "tensors"):
        statistics(stub, name=full_name, tensors=[2])
    with refused(INVALID, "INVALID_FIELD", "indices"):
        statistics(stub, name=full_name, indices=[0] * 50_001)
    with refused(INVALID, "INVALID_FIELD", "indices"):
        statistics(stub, name=full_name, random_indices=100_000)
    with refused(INVALID, "INVALID_FIELD", "quantiles"):
        statistics(stub, name=full_name, quantiles=[0.5] * 1001)
    assert len(statistics(stub, name=full_name, indices=[0, 1], tensors=[1]).tensors[0].elements) == 2


@pytest.mark.quiet
def test_many_milestones_cost_what_they_take_on_the_wire(client, name):
    """An update with 400,000 took 5 s, and each step counted them."""
    gradient, milestones = {"x": np.ones(3, np.float32)}, tuple(range(1 << 20, (1 << 20) + 400_000))
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), gradient)

    def seconds(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    plain = median_s(lambda: opt.step(gradient), seconds)
    # Both ends write them, read them and check them, which takes twice as long as this.
    read = min(seconds(lambda: json.loads(json.dumps(milestones))) for _ in range(3))
    schedule = optserve.AtSteps(rate=0.5, milestones=milestones)
    assert min(seconds(lambda: opt.update(schedule=schedule)) for _ in range(3)) < 6 * read
    assert median_s(lambda: opt.step(gradient), seconds) < 4 * plain
    assert opt.schedule == schedule


def median_s(call: Callable[[], object], seconds: Callable[[Callable[[], object]], float]) -> float:
    return sorted(seconds(call) for _ in range(50))[25]


def test_the_statistics_of_large_models_are_of_a_share_of_each_tensor(stub, name):
    """Their copies are bounded whatever the model; here six million elements, of which four million are looked at."""
    size = 1_000_000
    full_name = create(stub, name, {f"x{index}": (size,) for index in range(6)}).name
    with stream(stub, full_name) as steps:
        steps.send(begin())
        for index in range(6):
            steps.send(Request(chunk=steps_pb2.Chunk(tensor=index), data=np.full(size, index + 1, "<f4").tobytes()))
        steps.send(Request(commit=steps_pb2.Commit()))
        steps.reply()
    found = statistics(stub, name=full_name).tensors
    expected = [((index + 1) ** 2 * 0.05 + 1e-6) ** 0.5 for index in range(6)]
    assert [item.rms_gradient for item in found] == pytest.approx(expected, rel=1e-5)


def time_of_a_step_and_statistics(stub, name: str, count: int) -> float:
    """Seconds, with as many groups as parameters and alternating dtypes, so that no two parameters are neighbours."""
    rate = algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd(learning_rate=0.5))
    optimizer = optimizer_pb2.Optimizer(
        algorithm=SGD,
        parameters=[optimizer_pb2.Parameter(name=f"{i}", shape=[1], data_type=DATA_TYPES[i % 2]) for i in range(count)],
        groups=[optimizer_pb2.ParameterGroup(parameters=[f"{i}"], algorithm=rate) for i in range(count)],
    )
    created = stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer))
    given = [steps_pb2.Tensor(name=f"{i}", data=np.ones(1, f"<f{4 + 4 * (i % 2)}").tobytes()) for i in range(count)]
    took, updates = [], []
    for turn in range(3):
        started = time.monotonic()
        request = steps_pb2.ApplyGradientsRequest(name=created.optimizer.name, request_id=f"{turn}", gradients=given)
        updates = stub.ApplyGradients(request).updates
        statistics(stub, name=created.optimizer.name)
        took.append(time.monotonic() - started)
    assert {np.frombuffer(update.data, f"<f{len(update.data)}")[0] for update in updates} == {-0.5}
    return min(took)


def test_steps_and_statistics_take_linear_time_in_the_number_of_groups(stub, name):
    """4,000 groups took 5 s for a step and 25 s for statistics: every run of tensors went through every group."""
    few, many = (time_of_a_step_and_statistics(stub, f"{name}-{count}", count) for count in (500, 4000))
    # Eight times as many: quadratic time would be 64 times as long.
    assert many < 25 * few


def test_pages_of_optimizers_are_bounded_by_bytes(stub, name):
    """Six large optimizers made ListOptimizers fail for everybody."""
    names = [f"{i:05d}" + "n" * 90 for i in range(9000)]
    optimizer = optimizer_pb2.Optimizer(
        algorithm=SGD,
        parameters=[optimizer_pb2.Parameter(name=item, shape=[0]) for item in names],
        groups=[optimizer_pb2.ParameterGroup(parameters=names)],
    )
    made = [f"{name}-large-{turn}" for turn in range(6)]
    for optimizer_id in made:
        stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=optimizer_id, optimizer=optimizer))
    found, token = [], ""
    while True:
        page = stub.ListOptimizers(service_pb2.ListOptimizersRequest(page_size=1000, page_token=token))
        assert page.ByteSize() <= 4 << 20
        found += [item.name.removeprefix("optimizers/") for item in page.optimizers]
        token = page.next_page_token
        if not token:
            break
    assert [item for item in found if item in made] == made
    assert found == sorted(found)
    for optimizer_id in made:
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=f"optimizers/{optimizer_id}"))


def test_an_optimizer_that_could_not_be_shown_is_not_made(stub, name):
    names = [f"{i:05d}" + "n" * 200 for i in range(12_000)]
    optimizer = optimizer_pb2.Optimizer(
        algorithm=SGD, parameters=[optimizer_pb2.Parameter(name=item, shape=[0]) for item in names]
    )
    stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=f"{name}-fits", optimizer=optimizer))
    grouped = optimizer_pb2.Optimizer(
        name=f"optimizers/{name}-fits", groups=[optimizer_pb2.ParameterGroup(parameters=names)]
    )
    update = service_pb2.UpdateOptimizerRequest(optimizer=grouped)
    update.update_mask.paths.append("groups")
    with refused(EXHAUSTED, "MODEL_TOO_LARGE", "optimizer.parameters"):
        stub.UpdateOptimizer(update)
    shown = stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=f"optimizers/{name}-fits"))
    assert not shown.optimizer.groups


def test_a_state_is_exported_where_all_tensors_of_one_dtype_are_empty(stub, name):
    optimizer = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta()),
        parameters=[
            optimizer_pb2.Parameter(name="full", shape=[2], data_type=optimizer_pb2.DATA_TYPE_FLOAT32),
            optimizer_pb2.Parameter(name="empty", shape=[0], data_type=optimizer_pb2.DATA_TYPE_FLOAT64),
        ],
    )
    stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer))
    messages = list(stub.ExportState(checkpoints_pb2.ExportStateRequest(name=f"optimizers/{name}")))
    assert [(m.chunk.tensor, len(m.data)) for m in messages if m.HasField("chunk")] == [(0, 8), (0, 8)]


def test_fields_that_nobody_knows_are_not_looked_through_one_by_one():
    """They were, in Python: 9 MiB of them, 9 kB on the wire when compressed, took 4 s and the interpreter with them."""
    header = Request(chunk=steps_pb2.Chunk(tensor=1)).SerializeToString()
    unknown = b"\x48\x00" * 500_000  # field 9 is none of the contract
    started = time.thread_time()
    generated = Request.FromString(header + unknown)
    parsed_s = time.thread_time() - started
    started = time.thread_time()
    frame = wire.decode_request(header + unknown)
    assert time.thread_time() - started < 5 * parsed_s + 0.05
    assert frame.header.chunk == generated.chunk
    assert frame.data == b""


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_refused(server, algorithm):
    """A thousandth of a message's bytes would make the server hold it whole."""
    with grpc.insecure_channel(server.target, compression=algorithm) as channel:
        call = channel.unary_unary("/optserve.v1.OptimizerService/GetServerInfo", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(10_000), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "is disabled" in str(caught.value.details())


def test_lists_of_tensors_are_no_longer_than_the_model(stub, name):
    full_name = create(stub, name, {"x": (1,), "y": (1,)}).name
    with stream(stub, full_name) as steps:
        steps.send(begin(tensors=[0, 1, 0]))
        assert "names 3 tensors" in steps.error().message


def test_the_number_of_parameters_is_looked_at_before_each_of_them(stub, name):
    optimizer = optimizer_pb2.Optimizer(algorithm=SGD, parameters=[optimizer_pb2.Parameter()] * 20_001)
    with refused(EXHAUSTED, "MODEL_TOO_LARGE", "optimizer.parameters"):
        stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer))


def config_file(folder: Path, **settings) -> list[str]:
    path = folder / "optserve.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return ["--config", str(path)]


def test_tensors_without_elements_are_counted(tmp_path):
    """20,000 of them took 34.7 MiB, and counted nothing."""
    options = config_file(tmp_path, max_state_bytes=100 * MIB)
    with (
        optserve.local_server(backend="numpy", options=options) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        before = rss_bytes(server)
        made = 0
        with refused(EXHAUSTED, "SERVER_FULL") as seen:
            for made in range(20):
                create(stub, f"o{made}", {f"p{index}": (0,) for index in range(20_000)})
        assert made >= 1
        assert "max_state_bytes" in seen["message"]
        assert rss_bytes(server) - before < 110 * MIB


def test_settings_are_counted(tmp_path):
    options = config_file(tmp_path, max_state_bytes=MIB)
    with (
        optserve.local_server(backend="numpy", options=options) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        name = create(stub, "a", {"x": (1,)}).name
        steps = algorithms_pb2.StepSchedule(rate=0.5, milestones=range(1, 100_000))
        update = service_pb2.UpdateOptimizerRequest(
            optimizer=optimizer_pb2.Optimizer(name=name, schedule=algorithms_pb2.Schedule(step=steps))
        )
        update.update_mask.paths.append("schedule")
        with refused(EXHAUSTED, "SERVER_FULL"):
            stub.UpdateOptimizer(update)


def rss_bytes(server: optserve.LocalServer) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


@pytest.mark.parametrize(("durability", "fits"), [("memory", True), ("journal", False)])
def test_memory_is_what_the_process_itself_leaves(tmp_path, durability, fits):
    """In 300 MB a model was accepted whose first step the system killed, and every start after it."""
    options = [*config_file(tmp_path, memory_bytes=300_000_000), "--durability", durability]
    with (
        optserve.local_server(tmp_path / "data", backend="numpy", options=options) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        limit = stub.GetServerInfo(service_pb2.GetServerInfoRequest()).limits.max_state_bytes
        assert 100_000_000 < limit < 160_000_000
        # One gradient more is held while a step is recovered from the journal.
        size = limit // (3 * 4) - 50_000
        if fits:
            create(stub, "a", {"x": (size,)})
        else:
            with refused(EXHAUSTED, "SERVER_FULL") as seen:
                create(stub, "a", {"x": (size,)})
            assert "memory_bytes" in seen["message"]
            create(stub, "a", {"x": (size * 2 // 3,)})
        with refused(EXHAUSTED, "SERVER_FULL"):
            create(stub, "b", {"x": (size,)})


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"memory.max": "300000000"}, "0::/", 300_000_000),
        ({"memory.max": "max"}, "0::/", None),
        ({"memory.max": "max", "user.slice/app/memory.max": "200000000"}, "0::/user.slice/app", 200_000_000),
        ({"user.slice/memory.max": "100000000", "user.slice/app/memory.max": "max"}, "0::/user.slice/app", 100_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, "4:memory:/", None),
        ({"memory/docker/1f/memory.limit_in_bytes": "250000000"}, "3:cpu:/\n4:memory:/docker/1f", 250_000_000),
    ],
)
def test_the_memory_of_a_container_is_found_in_groups_of_both_versions_at_any_depth(tmp_path, files, own, expected):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    found = machine.usable_bytes(tmp_path / "cgroup", tmp_path / "own")
    assert found == (expected or psutil.virtual_memory().total)
