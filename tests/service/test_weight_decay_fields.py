"""Each kind of weight decay has a field of its own, so no client takes the number of one kind for that of another."""

from typing import Any

import grpc
import numpy as np
import pytest

import optserve
from optserve.settings import WEIGHT_DECAYS
from optserve.v1 import additions_pb2, algorithms_pb2, checkpoints_pb2, optimizer_pb2, service_pb2, steps_pb2
from service.wire_client import create, gradients, refused

SHAPES = {"w": (2,), "b": (2,)}
X = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
FACTORS: dict[str, Any] = {"mode": optimizer_pb2.MODE_HOSTED, "weight_decay_kind": optimizer_pb2.WEIGHT_DECAY_KIND_L2}
BAD = grpc.StatusCode.INVALID_ARGUMENT


def group(**decay: Any) -> optimizer_pb2.ParameterGroup:
    return optimizer_pb2.ParameterGroup(parameters=["b"], **decay)


def update(stub, name: str, *paths: str, **values: Any) -> optimizer_pb2.Optimizer:
    request = service_pb2.UpdateOptimizerRequest(optimizer=optimizer_pb2.Optimizer(name=name, **values))
    request.update_mask.paths.extend(paths)
    return stub.UpdateOptimizer(request).optimizer


@pytest.fixture(params=["times_learning_rate", "l2"])
def kind(request) -> str:
    """A kind that is not the fixed one."""
    return request.param


@pytest.fixture
def opt(client, name, kind):
    """An optimizer with a weight decay of that kind, and a group with a weight decay of its own."""
    decay = WEIGHT_DECAYS[kind](0.5)
    return client.create_optimizer(
        name, optserve.Sgd(0.5), X, hosted=True, weight_decay=decay, groups=[optserve.Group(["b"], weight_decay=0.25)]
    )


def test_a_client_that_knows_only_the_fixed_kind_sees_none(stub, client, opt):
    name = f"optimizers/{opt.name}"
    request = service_pb2.GetOptimizerRequest(name=name)
    (listed,) = [item.message for item in client.list_optimizers() if item.name == opt.name]
    exported = next(iter(stub.ExportState(checkpoints_pb2.ExportStateRequest(name=name)))).optimizer
    for message in (stub.GetOptimizer(request).optimizer, listed, exported):
        assert (message.weight_decay, message.weight_decay_factor) == (0.0, 0.5)
        assert not message.groups[0].HasField("weight_decay")
        assert message.groups[0].weight_decay_factor == 0.25


def test_the_fixed_kind_is_where_it_always_was(stub, client, name):
    client.create_optimizer(
        name, optserve.Sgd(), X, hosted=True, weight_decay=0.5, groups=[optserve.Group(["b"], weight_decay=0.25)]
    )
    message = stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")).optimizer
    assert (message.weight_decay, message.weight_decay_factor) == (0.5, 0.0)
    assert message.groups[0].weight_decay == 0.25
    assert not message.groups[0].HasField("weight_decay_factor")


def test_a_number_in_the_field_of_another_kind_is_refused(stub, name):
    with refused(BAD, "INVALID_FIELD", "optimizer.weight_decay"):
        create(stub, name, SHAPES, weight_decay=0.5, **FACTORS)
    with refused(BAD, "INVALID_FIELD", "optimizer.groups[0].weight_decay"):
        create(stub, name, SHAPES, groups=[group(weight_decay=0.5)], **FACTORS)
    with refused(BAD, "INVALID_FIELD", "optimizer.weight_decay_factor"):
        create(stub, name, SHAPES, weight_decay_factor=0.5, mode=optimizer_pb2.MODE_HOSTED)
    with refused(BAD, "INVALID_FIELD", "optimizer.groups[0].weight_decay_factor"):
        create(stub, name, SHAPES, groups=[group(weight_decay_factor=0.5)], mode=optimizer_pb2.MODE_HOSTED)


def test_a_step_and_an_addition_say_the_field_too(stub, opt):
    name = f"optimizers/{opt.name}"
    tensors = [steps_pb2.Tensor(name=key, data=value.tobytes()) for key, value in gradients(SHAPES).items()]
    request = steps_pb2.ApplyGradientsRequest(name=name, request_id="1", gradients=tensors)
    request.settings.add(weight_decay=0.5)
    with refused(BAD, "INVALID_FIELD", "settings[0].weight_decay"):
        stub.ApplyGradients(request)
    added = additions_pb2.AddParametersRequest(name=name, request_id="2", commit=steps_pb2.Commit())
    added.parameters.add(name="more")
    added.groups.add(parameters=["more"], weight_decay=0.5)
    with refused(BAD, "INVALID_FIELD", "groups[0].weight_decay"):
        stub.AddParameters(iter([added]))


def test_an_update_of_a_client_that_does_not_see_the_groups_decays_is_refused(stub, opt):
    name = f"optimizers/{opt.name}"
    before = stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=name)).optimizer
    rate = algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd(learning_rate=0.125))
    # As a client does that reads the groups, changes a learning rate, and sends them back.
    with refused(BAD, "INVALID_FIELD", "update_mask"):
        update(stub, name, "groups", groups=[optimizer_pb2.ParameterGroup(parameters=["b"], algorithm=rate)])
    with refused(BAD, "INVALID_FIELD", "update_mask"):
        update(stub, name, "weight_decay", weight_decay=0.125)
    with refused(BAD, "INVALID_FIELD", "update_mask"):
        update(stub, name, "weight_decay_kind")
    assert stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=name)).optimizer == before
    # What says nothing of weight decay is no concern of it.
    assert update(stub, name, "algorithm.sgd.learning_rate", algorithm=rate).groups == before.groups


def test_a_number_is_never_left_with_another_kind(stub, name):
    create(stub, name, SHAPES, weight_decay_factor=0.5, **FACTORS)
    name = f"optimizers/{name}"
    with refused(BAD, "INVALID_FIELD", "update_mask"):
        update(stub, name, "weight_decay_kind")
    fixed = update(stub, name, "weight_decay", weight_decay=0.25)
    assert (fixed.weight_decay, fixed.weight_decay_factor) == (0.25, 0.0)
    with refused(BAD, "INVALID_FIELD", "optimizer.weight_decay_factor"):
        update(stub, name, "weight_decay_factor", weight_decay_factor=0.5)
    assert update(stub, name, "weight_decay").weight_decay_kind == optimizer_pb2.WEIGHT_DECAY_KIND_FIXED


def test_a_client_that_knows_the_kinds_changes_groups_and_kinds(opt, kind):
    decay = WEIGHT_DECAYS[kind](0.5)
    groups = (optserve.Group(("b",), {"learning_rate": 0.25}, 0.125),)
    opt.update(groups=groups)
    assert (opt.groups, opt.weight_decay) == (groups, decay)
    with pytest.raises(optserve.InvalidArgumentError, match="name groups in the update mask too"):
        opt.update(weight_decay=0.25)
    opt.update(weight_decay=0.25, groups=groups)
    assert (opt.groups, opt.weight_decay) == (groups, 0.25)
    opt.update(weight_decay=decay, groups=groups)
    assert (opt.groups, opt.weight_decay) == (groups, decay)
    opt.update(groups=())
    assert (opt.groups, opt.weight_decay) == ((), decay)
    opt.update(weight_decay=0.25)
    assert opt.weight_decay == 0.25


def test_parameters_are_added_with_a_decay_of_the_optimizers_kind(opt):
    more = {"c": np.ones(2, np.float32)}
    opt.add_parameters(more, groups=[optserve.Group(["c"], weight_decay=0.0)])
    assert [item.weight_decay for item in opt.groups] == [0.25, 0.0]
    still = {key: np.zeros(2, np.float32) for key in (*SHAPES, "c")}
    after = opt.step(still, reply="parameters", hyperparameters=[None, {"weight_decay": 1.0}, None])
    assert [after[key][0] for key in still] == [0.75, 0.5, 1.0]


def test_a_step_of_a_client_that_knows_another_kind_is_refused(client, opt):
    other = client.optimizer(opt.name)
    other.update(weight_decay=0.5, groups=())
    still = {key: np.zeros(2, np.float32) for key in SHAPES}
    with pytest.raises(optserve.InvalidArgumentError, match="of the kind fixed, whose number belongs into"):
        opt.step(still, hyperparameters={"weight_decay": 0.5})
    opt.refresh()
    assert opt.step(still, reply="parameters", hyperparameters={"weight_decay": 0.5})["w"][0] == 0.5
