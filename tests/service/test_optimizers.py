"""Creating, reading, listing, changing and deleting optimizers."""

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from backend_under_test import BACKEND
from optserve.v1 import algorithms_pb2, optimizer_pb2, service_pb2
from service.wire_client import begin, create, refused, stream

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ADADELTA = algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta())


def parameter(name: str = "x", shape=(2,), **options) -> optimizer_pb2.Parameter:
    return optimizer_pb2.Parameter(name=name, shape=shape, **options)


def request(optimizer_id: str, **settings) -> service_pb2.CreateOptimizerRequest:
    settings = {"algorithm": ADADELTA, "parameters": [parameter()]} | settings
    return service_pb2.CreateOptimizerRequest(
        optimizer_id=optimizer_id, optimizer=optimizer_pb2.Optimizer(**settings), request_id=settings.pop("id", "")
    )


def get(stub, name: str) -> optimizer_pb2.Optimizer:
    return stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")).optimizer


def test_what_was_created_reads_back_with_every_default(stub, name):
    created = stub.CreateOptimizer(
        request(
            name, parameters=[parameter("w", (3, 2)), parameter("s", (), data_type=optimizer_pb2.DATA_TYPE_FLOAT64)]
        )
    ).optimizer
    assert created.name == f"optimizers/{name}"
    assert created.algorithm.adadelta == algorithms_pb2.Adadelta(rho=0.95, eps=1e-6, learning_rate=1.0)
    assert [(item.name, list(item.shape), item.data_type) for item in created.parameters] == [
        ("w", [3, 2], optimizer_pb2.DATA_TYPE_FLOAT32),
        ("s", [], optimizer_pb2.DATA_TYPE_FLOAT64),
    ]
    assert (created.step, list(created.slots)) == (0, ["square_avg", "acc_delta"])
    assert created.memory_bytes == 3 * (6 * 4 + 8)
    assert created.backend == BACKEND
    assert created.etag
    assert created.create_time.seconds > 1_700_000_000
    assert get(stub, name) == created


@pytest.mark.parametrize("method", ["adadelta", "sgd", "momentum", "adagrad", "windowed_rms"])
def test_every_method_can_be_created_with_its_defaults(stub, name, method):
    algorithm = algorithms_pb2.Algorithm()
    getattr(algorithm, method).SetInParent()
    created = stub.CreateOptimizer(request(name, algorithm=algorithm)).optimizer
    assert created.algorithm.WhichOneof("method") == method
    assert getattr(created.algorithm, method).HasField("learning_rate")


def test_a_taken_name_is_refused_and_the_optimizer_stays(stub, name):
    before = stub.CreateOptimizer(request(name)).optimizer
    with refused(grpc.StatusCode.ALREADY_EXISTS, "OPTIMIZER_EXISTS", "optimizer_id"):
        stub.CreateOptimizer(request(name))
    assert get(stub, name) == before


def test_a_retried_creation_answers_with_the_optimizer_that_it_made(stub, name):
    first = request(name)
    first.request_id = "once"
    assert stub.CreateOptimizer(first) == stub.CreateOptimizer(first)


def test_a_retry_that_comes_while_the_first_call_is_at_work_waits_for_it(stub, name):
    first = request(name, parameters=[parameter("x", (1 << 20,), data_type=optimizer_pb2.DATA_TYPE_FLOAT64)])
    first.request_id = "once"
    calls = [stub.CreateOptimizer.future(first) for _ in range(6)]
    made = [call.result(30).optimizer for call in calls]
    assert made == [made[0]] * 6


def test_concurrent_changes_of_different_fields_are_both_kept(stub, name):
    created = create(stub, name, {"x": (2,)})
    calls = []
    for index in range(1, 21):
        for field, value in (("rho", index / 100), ("eps", index / 10)):
            change = optimizer_pb2.Optimizer(
                name=created.name,
                algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(**{field: value})),
            )
            mask = FieldMask(paths=[f"algorithm.adadelta.{field}"])
            update = service_pb2.UpdateOptimizerRequest(optimizer=change, update_mask=mask)
            calls.append(stub.UpdateOptimizer.future(update))
        while calls:
            calls.pop().result(10)
        settings = get(stub, name).algorithm.adadelta
        assert (settings.rho, settings.eps) == (index / 100, index / 10)


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        ({"parameters": [parameter("a", (1,) * 33)]}, "INVALID_FIELD", "optimizer.parameters[0].shape"),
        ({"mode": 9}, "INVALID_FIELD", "optimizer.mode"),
        ({"parameters": []}, "INVALID_FIELD", "optimizer.parameters"),
        ({"parameters": [parameter("")]}, "INVALID_FIELD", "optimizer.parameters[0].name"),
        ({"parameters": [parameter("a"), parameter("x" * 257)]}, "INVALID_FIELD", "optimizer.parameters[1].name"),
        ({"parameters": [parameter("a\x00")]}, "INVALID_FIELD", "optimizer.parameters[0].name"),
        ({"parameters": [parameter("a"), parameter("a")]}, "DUPLICATE_PARAMETER", "optimizer.parameters[1].name"),
        (
            {"parameters": [parameter("a", data_type=optimizer_pb2.DATA_TYPE_FLOAT16)]},
            "WRONG_DATA_TYPE",
            "optimizer.parameters[0].data_type",
        ),
        ({"algorithm": algorithms_pb2.Algorithm()}, "INVALID_FIELD", "optimizer.algorithm"),
        (
            {"algorithm": algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(rho=1.5))},
            "HYPERPARAMETER_OUT_OF_RANGE",
            "optimizer.algorithm.adadelta.rho",
        ),
        (
            {"algorithm": algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(eps=float("nan")))},
            "HYPERPARAMETER_OUT_OF_RANGE",
            "optimizer.algorithm.adadelta.eps",
        ),
        (
            {"algorithm": algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd(learning_rate=-1))},
            "HYPERPARAMETER_OUT_OF_RANGE",
            "optimizer.algorithm.sgd.learning_rate",
        ),
    ],
)
def test_bad_settings_are_refused_with_the_path_of_the_field(stub, name, settings, reason, field):
    with refused(INVALID, reason, field):
        stub.CreateOptimizer(request(name, **settings))
    stub.CreateOptimizer(request(name))  # the name was not taken


@pytest.mark.parametrize("optimizer_id", ["", "A", "-a", "a/b", "../a", "a" * 65, "ä"])
def test_an_unusable_id_is_refused(stub, optimizer_id):
    with refused(INVALID, "INVALID_FIELD", "optimizer_id"):
        stub.CreateOptimizer(request(optimizer_id))


@pytest.mark.parametrize("shape", [(1 << 60, 1 << 60), (1 << 35,)])
def test_a_model_that_is_too_large_is_refused(stub, name, shape):
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE", "optimizer.parameters") as seen:
        stub.CreateOptimizer(request(name, parameters=[parameter("x", shape)]))
    assert seen["metadata"]["limit"] == str(64 << 30)


def test_a_consistency_without_a_kind_is_refused(stub, name):
    with refused(INVALID, "INVALID_FIELD", "optimizer.consistency"):
        stub.CreateOptimizer(request(name, consistency=optimizer_pb2.Consistency()))


def test_hyperparameters_change_on_a_live_optimizer_and_its_state_stays(stub, name):
    before = create(stub, name, {"x": (2,)})
    change = optimizer_pb2.Optimizer(
        name=before.name,
        etag=before.etag,
        algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(rho=0.5, eps=1.0)),
    )
    after = stub.UpdateOptimizer(
        service_pb2.UpdateOptimizerRequest(optimizer=change, update_mask=FieldMask(paths=["algorithm.adadelta.rho"]))
    ).optimizer
    assert after.algorithm.adadelta == algorithms_pb2.Adadelta(rho=0.5, eps=1e-6, learning_rate=1.0)
    assert after.etag != before.etag
    with refused(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag"):
        stub.UpdateOptimizer(
            service_pb2.UpdateOptimizerRequest(optimizer=change, update_mask=FieldMask(paths=["algorithm"]))
        )


@pytest.mark.parametrize(
    ("algorithm", "paths", "reason", "field"),
    [
        (ADADELTA, [], "INVALID_FIELD", "update_mask"),
        (ADADELTA, ["step"], "INVALID_FIELD", "update_mask"),
        (ADADELTA, ["algorithm.adadelta.momentum"], "INVALID_FIELD", "update_mask"),
        (algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd()), ["algorithm"], "INVALID_FIELD", "optimizer.algorithm"),
        (
            algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta(rho=7)),
            ["algorithm"],
            "HYPERPARAMETER_OUT_OF_RANGE",
            "optimizer.algorithm.adadelta.rho",
        ),
    ],
)
def test_a_change_that_cannot_be_is_refused_as_a_whole(stub, name, algorithm, paths, reason, field):
    before = create(stub, name, {"x": (2,)})
    change = optimizer_pb2.Optimizer(name=before.name, algorithm=algorithm)
    with refused(INVALID, reason, field):
        stub.UpdateOptimizer(service_pb2.UpdateOptimizerRequest(optimizer=change, update_mask=FieldMask(paths=paths)))
    assert get(stub, name) == before


def test_optimizers_are_listed_by_name_in_pages(stub, name):
    ids = [f"{name}-{letter}" for letter in "cab"]
    for optimizer_id in ids:
        create(stub, optimizer_id, {"x": (1,)})
    found, token = [], ""
    while True:
        page = stub.ListOptimizers(service_pb2.ListOptimizersRequest(page_size=2, page_token=token))
        assert len(page.optimizers) <= 2
        found += [item.name for item in page.optimizers]
        token = page.next_page_token
        if not token:
            break
    assert found == sorted(found)
    assert {f"optimizers/{optimizer_id}" for optimizer_id in ids} <= set(found)


@pytest.mark.parametrize(
    ("options", "field"), [({"page_token": "?"}, "page_token"), ({"page_size": 1001}, "page_size")]
)
def test_bad_paging_is_refused(stub, options, field):
    with refused(INVALID, "INVALID_PAGE_TOKEN" if field == "page_token" else "INVALID_FIELD", field):
        stub.ListOptimizers(service_pb2.ListOptimizersRequest(**options))


def test_a_deleted_optimizer_is_gone_also_for_open_streams(stub, name):
    resource = create(stub, name, {"x": (1,)}).name
    with stream(stub, resource) as steps:
        with refused(grpc.StatusCode.ABORTED, "ETAG_MISMATCH"):
            stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=resource, etag="stale"))
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=resource))
        steps.send(begin())
        assert steps.error().code == grpc.StatusCode.NOT_FOUND.value[0]
    with refused(grpc.StatusCode.NOT_FOUND, "OPTIMIZER_NOT_FOUND"):
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=resource))
    stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=resource, allow_missing=True))
    create(stub, name, {"x": (1,)})


@pytest.mark.parametrize(
    "other",
    [
        {"parameters": [parameter(shape=(3,))]},
        {"algorithm": algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd())},
        {"mode": optimizer_pb2.MODE_HOSTED},
    ],
    ids=["parameters", "method", "mode"],
)
def test_a_creation_under_the_request_id_of_another_is_refused(stub, name, other):
    first = request(name)
    first.request_id = "once"
    made = stub.CreateOptimizer(first)
    assert stub.CreateOptimizer(first) == made
    second = request(name, **other)
    second.request_id = "once"
    with refused(INVALID, "REQUEST_ID_REUSED", "request_id"):
        stub.CreateOptimizer(second)
