"""ExportState, ImportState and the checkpoint calls as any client meets them: codes, reasons and field paths."""

import grpc
import numpy as np
import pytest

from optserve.v1 import algorithms_pb2, optimizer_pb2, service_pb2, steps_pb2
from optserve.v1 import checkpoints_pb2 as pb
from service.wire_client import create, gradients, refused

SHAPES = {"w": (20, 30), "b": (30,)}
Import = pb.ImportStateRequest


@pytest.fixture
def optimizer(stub, name):
    made = create(stub, name, SHAPES)
    tensors = [steps_pb2.Tensor(name=key, data=g.tobytes()) for key, g in gradients(SHAPES).items()]
    stub.ApplyGradients(steps_pb2.ApplyGradientsRequest(name=made.name, request_id="r", gradients=tensors))
    return made.name


def get(stub, optimizer):
    return stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=optimizer)).optimizer


def exported(stub, optimizer) -> dict[tuple[int, int], bytes]:
    arrays: dict[tuple[int, int], bytes] = {}
    for message in stub.ExportState(pb.ExportStateRequest(name=optimizer)):
        if message.HasField("chunk"):
            key = (message.chunk.tensor, message.chunk.slot)
            assert message.chunk.offset == len(arrays.get(key, b""))
            arrays[key] = arrays.get(key, b"") + message.data
    return arrays


def chunk(tensor: int, slot: int, data: bytes, offset: int = 0, **options) -> Import:
    return Import(chunk=pb.SlotChunk(tensor=tensor, slot=slot, offset=offset), data=data, **options)


def whole(arrays: dict[tuple[int, int], bytes]) -> list[Import]:
    return [chunk(tensor, slot, data) for (tensor, slot), data in arrays.items()]


COMMIT = Import(commit=steps_pb2.Commit())


def test_the_first_message_of_an_export_is_the_optimizer(stub, optimizer):
    first, *rest = stub.ExportState(pb.ExportStateRequest(name=optimizer))
    assert (first.optimizer.name, first.optimizer.step) == (optimizer, 1)
    assert list(first.optimizer.slots) == ["square_avg", "acc_delta"]
    assert first.optimizer.lineage
    assert not first.HasField("chunk")
    assert not any(message.HasField("optimizer") for message in rest)
    assert {len(data) for data in exported(stub, optimizer).values()} == {2400, 120}


def test_an_import_may_come_in_any_order_and_in_one_message_per_byte_range(stub, optimizer):
    arrays = exported(stub, optimizer)
    messages = [Import(name=optimizer, step=7)]
    for (tensor, slot), data in reversed(arrays.items()):
        offsets = reversed(range(0, len(data), 500))
        messages.extend(chunk(tensor, slot, data[offset : offset + 500], offset) for offset in offsets)
    before = get(stub, optimizer)
    after = stub.ImportState(iter([*messages, COMMIT])).optimizer
    assert after.step == 7
    assert after.etag != before.etag
    assert after.lineage != before.lineage
    assert exported(stub, optimizer) == arrays


def test_settings_come_with_a_state_and_those_that_are_not_named_stay(stub, name):
    made = create(stub, name, {"x": (2,)}, clipping=optimizer_pb2.Clipping(value=1.0))
    settings = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(rho=0.5)),
        schedule=algorithms_pb2.Schedule(cosine=algorithms_pb2.CosineSchedule(period_steps=9)),
    )
    messages = [
        Import(
            name=made.name, step=3, optimizer=settings, update_mask={"paths": ["algorithm.adadelta.rho", "schedule"]}
        ),
        *whole(exported(stub, made.name)),
        COMMIT,
    ]
    after = stub.ImportState(iter(messages)).optimizer
    assert (after.step, after.algorithm.adadelta.rho, after.algorithm.adadelta.eps) == (3, 0.5, 1e-6)
    assert (after.schedule.cosine.period_steps, after.clipping.value) == (9, 1.0)
    assert get(stub, made.name) == after


def test_first_chunk_and_commit_may_share_a_message(stub, name):
    made = create(stub, name, {"x": (2,)})
    messages = [
        chunk(0, 0, np.array([1, 2], np.float32).tobytes(), name=made.name, step=3),
        chunk(0, 1, np.array([3, 4], np.float32).tobytes(), commit=steps_pb2.Commit()),
    ]
    assert stub.ImportState(iter(messages)).optimizer.step == 3
    assert exported(stub, made.name)[0, 1] == np.array([3, 4], np.float32).tobytes()


def test_a_retried_import_is_made_once(stub, optimizer):
    start = Import(name=optimizer, step=7, request_id="i", etag=get(stub, optimizer).etag)
    messages = [start, *whole(exported(stub, optimizer)), COMMIT]
    first = stub.ImportState(iter(messages)).optimizer
    assert stub.ImportState(iter(messages)).optimizer == first
    # Another import under that id is none that was made.
    messages[0].step = 9
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", "request_id"):
        stub.ImportState(iter(messages))
    assert get(stub, optimizer) == first


@pytest.mark.parametrize(
    ("spoil", "code", "reason", "field"),
    [
        (lambda m: m[:-1], "INVALID_ARGUMENT", "INVALID_FIELD", "commit"),
        (lambda m: [], "INVALID_ARGUMENT", "INVALID_FIELD", "name"),
        (lambda m: m[1:], "INVALID_ARGUMENT", "INVALID_FIELD", "name"),
        (lambda m: [m[0], *m[2:]], "INVALID_ARGUMENT", "MISSING_CHUNK", "chunk"),
        (lambda m: [m[0], m[1], *m[1:]], "INVALID_ARGUMENT", "OVERLAPPING_CHUNK", "chunk.offset"),
        (lambda m: [m[0], chunk(2, 0, b"")], "INVALID_ARGUMENT", "UNKNOWN_PARAMETER", "chunk.tensor"),
        (lambda m: [m[0], chunk(0, 2, b"")], "INVALID_ARGUMENT", "INVALID_FIELD", "chunk.slot"),
        (lambda m: [m[0], chunk(1, 0, bytes(4), 120)], "INVALID_ARGUMENT", "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
        (lambda m: [m[0], chunk(1, 0, bytes(4), 2)], "INVALID_ARGUMENT", "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
        (lambda m: [m[0], chunk(1, 0, bytes(3))], "INVALID_ARGUMENT", "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
        (
            lambda m: [m[0], chunk(1, 0, np.array([np.inf], np.float32).tobytes(), 4)],
            "INVALID_ARGUMENT",
            "NON_FINITE_VALUE",
            "data",
        ),
        (
            lambda m: [m[0], chunk(1, 0, np.array([-1e-9], np.float32).tobytes(), 4)],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "data",
        ),
        (lambda m: [m[0], Import(data=b"1234")], "INVALID_ARGUMENT", "INVALID_FIELD", "chunk"),
        (
            lambda m: [m[0], Import(chunk=pb.SlotChunk(parameter=True))],
            "FAILED_PRECONDITION",
            "NOT_HOSTED",
            "chunk.parameter",
        ),
        (
            lambda m: [m[0], Import(chunk=pb.SlotChunk(parameter=False))],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "chunk.parameter",
        ),
        (
            lambda m: [Import(name=m[0].name, step=2**62 + 1), *m[1:]],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "step",
        ),
        (
            lambda m: [Import(name=m[0].name, optimizer=optimizer_pb2.Optimizer()), *m[1:]],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "update_mask",
        ),
        (
            lambda m: [Import(name=m[0].name, update_mask={"paths": ["schedule", "mode"]}), *m[1:]],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "update_mask",
        ),
        (
            lambda m: [
                Import(
                    name=m[0].name,
                    optimizer=optimizer_pb2.Optimizer(
                        algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(rho=2.0))
                    ),
                    update_mask={"paths": ["algorithm"]},
                ),
                *m[1:],
            ],
            "INVALID_ARGUMENT",
            "HYPERPARAMETER_OUT_OF_RANGE",
            "optimizer.algorithm.adadelta.rho",
        ),
        (lambda m: [Import(name="optimizers/nobody")], "NOT_FOUND", "OPTIMIZER_NOT_FOUND", "name"),
        (lambda m: [Import(name=m[0].name, etag="old"), *m[1:]], "ABORTED", "ETAG_MISMATCH", "etag"),
        (lambda m: [Import(name=m[0].name, request_id="ü"), *m[1:]], "INVALID_ARGUMENT", "INVALID_FIELD", "request_id"),
    ],
)
def test_a_bad_import_changes_nothing(stub, optimizer, spoil, code, reason, field):
    arrays, before = exported(stub, optimizer), get(stub, optimizer)
    messages = [Import(name=optimizer, step=7), *whole(arrays), COMMIT]
    with refused(grpc.StatusCode[code], reason, field):
        stub.ImportState(iter(spoil(messages)))
    assert get(stub, optimizer) == before
    assert exported(stub, optimizer) == arrays


def test_an_import_that_stops_moving_is_cut_off(tmp_path):
    import queue

    import optserve
    from optserve.v1 import service_pb2_grpc

    path = tmp_path / "optserve.toml"
    path.write_text("idle_step_s = 0.2\n")
    with (
        optserve.local_server(backend="numpy", options=["--config", str(path)]) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        made = create(stub, "a", SHAPES)
        messages: queue.SimpleQueue[Import | None] = queue.SimpleQueue()
        messages.put(Import(name=made.name))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ImportState(iter(messages.get, None), timeout=20)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        messages.put(None)


def test_a_message_that_is_none_is_refused(server):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_unary("/optserve.v1.OptimizerService/ImportState", bytes, bytes)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
            call(iter([b"\xff\xff"]))


def test_unary_steps_can_say_which_state_they_mean(stub, optimizer):
    lineage = get(stub, optimizer).lineage
    tensors = [steps_pb2.Tensor(name="b", data=bytes(120))]

    def step(request_id: str, lineage: str):
        request = steps_pb2.ApplyGradientsRequest(
            name=optimizer, request_id=request_id, gradients=tensors, lineage=lineage
        )
        return stub.ApplyGradients(request)

    assert step("a", lineage).result.step == 2
    stub.ImportState(iter([Import(name=optimizer, step=2), *whole(exported(stub, optimizer)), COMMIT]))
    with refused(grpc.StatusCode.ABORTED, "STATE_REPLACED") as seen:
        step("b", lineage)
    assert seen["metadata"] == {"lineage": get(stub, optimizer).lineage, "current_step": "2"}
    assert step("b", "").result.step == 3


@pytest.mark.parametrize(
    "name", ["", "optimizers/a", "optimizers/a/checkpoints/", "optimizers/../checkpoints/a", "a/checkpoints/b",
             "optimizers/a/checkpoints/../../x", "optimizers/a/checkpoints/b/c"],
)  # fmt: skip
def test_names_that_are_none_are_refused(stub, name):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "name"):
        stub.RestoreCheckpoint(pb.RestoreCheckpointRequest(name=name))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "name"):
        stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(name=name))


def test_checkpoint_calls_name_what_is_wrong(stub, optimizer):
    save = pb.SaveCheckpointRequest(parent=optimizer, tag="one")
    saved = stub.SaveCheckpoint(save).checkpoint
    assert saved.name == f"{optimizer}/checkpoints/one"
    with refused(grpc.StatusCode.ALREADY_EXISTS, "CHECKPOINT_EXISTS", "tag") as seen:
        stub.SaveCheckpoint(save)
    assert seen["metadata"] == {"checkpoint": "one"}
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "tag"):
        stub.SaveCheckpoint(pb.SaveCheckpointRequest(parent=optimizer, tag="../x"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "parent"):
        stub.SaveCheckpoint(pb.SaveCheckpointRequest(parent="a/../b", tag="x"))
    with refused(grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND", "name") as seen:
        stub.RestoreCheckpoint(pb.RestoreCheckpointRequest(name=f"{optimizer}/checkpoints/two"))
    assert seen["metadata"] == {"checkpoint": "two"}
    with refused(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag"):
        stub.RestoreCheckpoint(pb.RestoreCheckpointRequest(name=saved.name, etag="old"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "page_size"):
        stub.ListCheckpoints(pb.ListCheckpointsRequest(parent=optimizer, page_size=1001))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN", "page_token"):
        stub.ListCheckpoints(pb.ListCheckpointsRequest(parent=optimizer, page_token="ü"))  # noqa: S106
    for tag in ("two", "three"):
        stub.SaveCheckpoint(pb.SaveCheckpointRequest(parent=optimizer, tag=tag))
    first = stub.ListCheckpoints(pb.ListCheckpointsRequest(parent=optimizer, page_size=2))
    rest = stub.ListCheckpoints(pb.ListCheckpointsRequest(parent=optimizer, page_token=first.next_page_token))
    assert [item.name.rpartition("/")[2] for item in (*first.checkpoints, *rest.checkpoints)] == ["one", "two", "three"]
    assert not rest.next_page_token
    gone = pb.DeleteCheckpointRequest(name=saved.name)
    stub.DeleteCheckpoint(gone)
    with refused(grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND", "name"):
        stub.DeleteCheckpoint(gone)
    gone.allow_missing = True
    stub.DeleteCheckpoint(gone)
