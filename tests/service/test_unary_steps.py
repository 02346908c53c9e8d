"""ApplyGradients: all that a small model needs."""

import grpc
import numpy as np
import pytest

from optserve.v1 import optimizer_pb2, steps_pb2
from service.wire_client import create, gradients, refused

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SHAPES = {"w": (4, 3), "b": (3,), "scalar": (), "empty": (0, 2)}


def tensors(values: dict[str, np.ndarray]) -> list[steps_pb2.Tensor]:
    return [steps_pb2.Tensor(name=name, data=value.tobytes()) for name, value in values.items()]


def apply(stub, name: str, gradient_tensors, request_id: str = "r1", **options) -> steps_pb2.ApplyGradientsResponse:
    request = steps_pb2.ApplyGradientsRequest(
        name=f"optimizers/{name}", request_id=request_id, gradients=gradient_tensors, **options
    )
    return stub.ApplyGradients(request)


@pytest.fixture
def optimizer(stub, name) -> str:
    create(stub, name, SHAPES)
    return name


def test_a_step_answers_with_an_update_per_gradient_in_the_same_order(stub, optimizer):
    values = dict(reversed(gradients(SHAPES).items()))
    answer = apply(stub, optimizer, tensors(values), expected_step=0)
    assert (answer.result.step, answer.result.replayed) == (1, False)
    assert [update.name for update in answer.updates] == list(values)
    for update in answer.updates:
        g = values[update.name].astype(np.float64)
        dx = np.frombuffer(update.data, "<f4").reshape(update.shape)
        np.testing.assert_allclose(dx, -np.sqrt(1e-6) / np.sqrt(0.05 * g**2 + 1e-6) * g, rtol=1e-5)


def test_a_retry_is_applied_once_and_gets_the_same_bytes(stub, optimizer):
    first = apply(stub, optimizer, tensors(gradients(SHAPES)))
    again = apply(stub, optimizer, tensors(gradients(SHAPES)))
    assert again.result.replayed
    assert again.updates == first.updates
    assert again.result.step == first.result.step == 1


def test_parameters_that_are_not_listed_are_left_alone(stub, optimizer):
    answer = apply(stub, optimizer, tensors({"b": np.ones(3, np.float32)}))
    assert [update.name for update in answer.updates] == ["b"]


@pytest.mark.parametrize(
    ("tensor", "reason", "field"),
    [
        ({"name": "x"}, "UNKNOWN_PARAMETER", "gradients[0].name"),
        ({"name": ""}, "UNKNOWN_PARAMETER", "gradients[0].name"),
        ({"name": "b", "data": bytes(11)}, "WRONG_BYTE_COUNT", "gradients[0].data"),
        ({"name": "b"}, "WRONG_BYTE_COUNT", "gradients[0].data"),
        ({"name": "b", "data": bytes(12), "shape": [1, 3]}, "WRONG_SHAPE", "gradients[0].shape"),
        (
            {"name": "b", "data": bytes(24), "data_type": optimizer_pb2.DATA_TYPE_FLOAT64},
            "WRONG_DATA_TYPE",
            "gradients[0].data_type",
        ),
        (
            {"name": "b", "data": np.array([1, np.nan, np.inf], "<f4").tobytes()},
            "NON_FINITE_VALUE",
            "gradients[0].data",
        ),
        ({"name": "b", "data": np.array([1, 3e38, 0], "<f4").tobytes()}, "GRADIENT_OVERFLOW", "gradients[0].data"),
    ],
)
def test_a_bad_gradient_is_refused_and_changes_nothing(stub, optimizer, tensor, reason, field):
    with refused(INVALID, reason, field) as seen:
        apply(stub, optimizer, [steps_pb2.Tensor(**tensor), *tensors({"scalar": np.ones((), np.float32)})])
    assert seen["metadata"]["parameter"] == tensor["name"]
    assert apply(stub, optimizer, tensors(gradients(SHAPES)), "r2", expected_step=0).result.step == 1


def test_a_parameter_given_twice_is_refused(stub, optimizer):
    with refused(INVALID, "DUPLICATE_PARAMETER"):
        apply(stub, optimizer, tensors({"b": np.ones(3, np.float32)}) * 2)


def test_no_gradients_at_all_are_refused(stub, optimizer):
    with refused(INVALID, "INVALID_FIELD", "gradients"):
        apply(stub, optimizer, [])


def test_a_missing_request_id_is_refused(stub, optimizer):
    with refused(INVALID, "INVALID_FIELD", "request_id"):
        apply(stub, optimizer, tensors(gradients(SHAPES)), "")


def test_a_wrong_expected_step_is_aborted_with_the_current_one(stub, optimizer):
    with refused(grpc.StatusCode.ABORTED, "WRONG_STEP") as seen:
        apply(stub, optimizer, tensors(gradients(SHAPES)), expected_step=7)
    assert seen["metadata"]["current_step"] == "0"


def test_an_unknown_optimizer_is_not_found(stub):
    with refused(grpc.StatusCode.NOT_FOUND, "OPTIMIZER_NOT_FOUND", "name"):
        apply(stub, "nobody", tensors(gradients(SHAPES)))


@pytest.mark.parametrize("resource", ["", "mlp", "optimizers/", "optimizers/a/b", "checkpoints/a"])
def test_a_malformed_resource_name_is_refused(stub, resource):
    with refused(INVALID, "INVALID_FIELD", "name"):
        stub.ApplyGradients(steps_pb2.ApplyGradientsRequest(name=resource, request_id="a"))


def test_an_oversize_message_is_refused_with_the_limit(stub, name):
    create(stub, name, {"big": (1 << 21,)})
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as seen:
        apply(stub, name, [steps_pb2.Tensor(name="big", data=bytes(4 << 21))])
    assert seen["metadata"]["limit_bytes"] == str(4 << 20)


def test_a_reply_that_would_be_too_large_is_refused_before_the_step_is_applied(stub, name):
    create(stub, name, {f"parameter-{index}": (250,) for index in range(4000)})
    values = {f"parameter-{index}": np.ones(250, np.float32) for index in range(4000)}
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE", "gradients") as seen:
        apply(stub, name, tensors(values))
    assert "The reply" in seen["message"]
    assert apply(stub, name, tensors({"parameter-0": np.ones(250, np.float32)}), expected_step=0).result.step == 1
