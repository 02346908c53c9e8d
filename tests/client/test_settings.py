"""Annealing, clipping and groups of parameters: what the server makes of them, step by step."""

import math
import os
import signal

import grpc
import numpy as np
import pytest
import torch

import optserve
from backend_under_test import BACKEND
from optserve.v1 import algorithms_pb2, optimizer_pb2, service_pb2
from present import present
from service.wire_client import begin, chunk, commit, refused, stream

SCHEDULES = {
    "constant": (optserve.Constant(), lambda t: 1.0),
    "warm-up": (optserve.Constant(warmup_steps=4), lambda t: min((t + 1) / 5, 1.0)),
    "inverse-time": (optserve.InverseTime(decay=0.5), lambda t: 1 / (1 + t / 2)),
    "exponential": (optserve.Exponential(rate=0.9), lambda t: 0.9**t),
    "exponential-period": (optserve.Exponential(rate=0.5, period_steps=3), lambda t: math.exp(math.log(0.5) * t / 3)),
    "steps": (
        optserve.AtSteps(rate=0.1, milestones=(2, 5, 6)),
        lambda t: 1.0 if t < 2 else 0.1 if t < 5 else 0.01 if t < 6 else 0.001,
    ),
    "cosine": (
        optserve.Cosine(period_steps=8, floor=0.25),
        lambda t: 0.25 if t >= 8 else 0.25 + 0.375 * (1 + math.cos(math.pi * t / 8)),
    ),
    "cosine-after-warm-up": (
        optserve.Cosine(period_steps=4, warmup_steps=3),
        lambda t: (t + 1) / 4 if t < 3 else (1 + math.cos(math.pi * min(t - 3, 4) / 4)) / 2,
    ),
}

SHAPES = {"w": ((30, 7), "float32"), "b": ((9,), "float64"), "v": ((5,), "float32")}


def gradients(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(dtype) for name, (shape, dtype) in SHAPES.items()}


def bits(updates: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: update.tobytes() for name, update in updates.items()}


@pytest.mark.parametrize(("schedule", "factor"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_learning_rate_follows_the_schedule(client, name, schedule, factor):
    one = {"x": np.ones(1)}
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=0.5), one, schedule=schedule)
    assert opt.schedule == schedule
    for t in range(12):
        assert opt.step(one)["x"][0] == pytest.approx(-0.5 * factor(t), rel=1e-14)


def test_annealing_scales_the_step_of_adadelta_and_not_its_state(client, name):
    plain = client.create_optimizer(f"{name}-plain", optserve.Adadelta(), gradients(0))
    annealed = client.create_optimizer(
        f"{name}-annealed", optserve.Adadelta(), gradients(0), schedule=optserve.InverseTime(decay=1.0)
    )
    for t in range(4):
        whole, part = plain.step(gradients(t))["b"], annealed.step(gradients(t))["b"]
        np.testing.assert_allclose(part, whole / (1 + t), rtol=1e-14)
    slots = [opt.export_state().slots["b"]["acc_delta"].tobytes() for opt in (plain, annealed)]
    assert slots[0] == slots[1]


@pytest.mark.parametrize("algorithm", [optserve.Momentum(), optserve.Adagrad(), optserve.WindowedRms()])
def test_every_method_with_a_learning_rate_can_be_annealed(client, name, algorithm):
    opt = client.create_optimizer(name, algorithm, gradients(0), schedule=optserve.AtSteps(rate=0.5, milestones=(1,)))
    other = client.create_optimizer(f"{name}-by-hand", algorithm, gradients(0))
    for t in range(3):
        assert bits(opt.step(gradients(t))) == bits(other.step(gradients(t)))
        halved = type(algorithm)(learning_rate=algorithm.learning_rate / 2)
        other.update(halved)


def test_clipping_by_value_norm_and_global_norm_is_that_of_torch(client, name):
    ways = {
        "value": lambda params: torch.nn.utils.clip_grad_value_(params, 0.5),
        "norm": lambda params: [torch.nn.utils.clip_grad_norm_([param], 2.0) for param in params],
        "global_norm": lambda params: torch.nn.utils.clip_grad_norm_(params, 2.0),
    }
    given = gradients(3)
    for kind, clip in ways.items():
        bound = 0.5 if kind == "value" else 2.0
        opt = client.create_optimizer(
            f"{name}-{kind.replace('_', '-')}", optserve.Sgd(learning_rate=1.0), given,
            clipping=optserve.Clipping(**{kind: bound}),
        )  # fmt: skip
        assert opt.clipping == optserve.Clipping(**{kind: bound})
        updates = opt.step(given)
        params = {key: torch.zeros(array.shape, dtype=torch.float64) for key, array in given.items()}
        for key, param in params.items():
            param.grad = torch.tensor(given[key], dtype=torch.float64)
        clip(list(params.values()))
        for key, param in params.items():
            np.testing.assert_allclose(-updates[key], present(param.grad).numpy(), rtol=2e-6)


def test_a_gradient_within_the_bound_is_not_touched(client, name):
    plain = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    for kind in ("value", "norm", "global_norm"):
        opt = client.create_optimizer(
            f"{name}-{kind.replace('_', '-')}", optserve.Adadelta(), gradients(0),
            clipping=optserve.Clipping(**{kind: 1e6}),
        )  # fmt: skip
        assert bits(opt.step(gradients(0))) == bits(plain.step(gradients(0)))
        plain.refresh()
        client.delete_optimizer(name)
        plain = client.create_optimizer(name, optserve.Adadelta(), gradients(0))


@pytest.mark.parametrize("kind", ["norm", "global_norm"])
def test_a_gradient_whose_squares_overflow_is_clipped_as_any_other(client, name, kind):
    gradient = {"x": np.array([3e200, -4e200])}
    opt = client.create_optimizer(
        name, optserve.Sgd(learning_rate=1.0), gradient, clipping=optserve.Clipping(**{kind: 10.0})
    )
    np.testing.assert_allclose(opt.step(gradient)["x"], [-6.0, 8.0], rtol=1e-14)
    np.testing.assert_allclose(opt.step({"x": np.array([3.0, 4.0])})["x"], [-3.0, -4.0])


def test_groups_have_hyperparameters_of_their_own(client, name):
    groups = (optserve.Group(("b",), {"rho": 0.5}), optserve.Group(("v",), {"eps": 1e-2, "learning_rate": 0.1}))
    opt = client.create_optimizer(name, optserve.Adadelta(), gradients(0), groups=groups)
    assert opt.groups == groups
    apart = {
        "w": optserve.Adadelta(),
        "b": optserve.Adadelta(rho=0.5),
        "v": optserve.Adadelta(eps=1e-2, learning_rate=0.1),
    }
    others = {
        key: client.create_optimizer(f"{name}-{key}", algorithm, {key: gradients(0)[key]})
        for key, algorithm in apart.items()
    }
    for seed in range(4):
        updates = opt.step(gradients(seed))
        for key, other in others.items():
            assert updates[key].tobytes() == other.step({key: gradients(seed)[key]})[key].tobytes()
    # What a group does not override it inherits, also later.
    opt.update(optserve.Adadelta(eps=1e-3))
    others["b"].update(optserve.Adadelta(rho=0.5, eps=1e-3))
    assert opt.step(gradients(5))["b"].tobytes() == others["b"].step({"b": gradients(5)["b"]})["b"].tobytes()


def test_all_of_it_can_be_changed_and_taken_away_while_the_state_stays(client, name):
    plain = client.create_optimizer(f"{name}-plain", optserve.Momentum(), gradients(0))
    opt = client.create_optimizer(
        name, optserve.Momentum(), gradients(0), schedule=optserve.Cosine(period_steps=10),
        clipping=optserve.Clipping(norm=1.0), groups=[optserve.Group(["w"], {"rho": 0.1})],
    )  # fmt: skip
    opt.update(schedule=None, clipping=None, groups=())
    assert (opt.schedule, opt.clipping, opt.groups) == (None, None, ())
    assert bits(opt.step(gradients(0))) == bits(plain.step(gradients(0)))
    opt.update(clipping=optserve.Clipping(value=1e-3))
    assert opt.schedule is None
    assert opt.algorithm == optserve.Momentum()
    assert max(np.abs(update).max() for update in opt.step(gradients(1, scale=100.0)).values()) < 1


def test_they_are_part_of_what_survives_a_crash_and_of_a_checkpoint(tmp_path, client, name):
    options = {
        "schedule": optserve.Exponential(rate=0.9, warmup_steps=2),
        "clipping": optserve.Clipping(global_norm=3.0),
        "groups": (optserve.Group(("b", "v"), {"rho": 0.9}),),
    }
    reference = client.create_optimizer(name, optserve.Adadelta(), gradients(0), **options)
    expected = [bits(reference.step(gradients(seed))) for seed in range(8)]
    with optserve.local_server(tmp_path, backend=BACKEND) as server, optserve.connect(server.target) as before:
        for transport in ("shm", "grpc"):
            before.create_optimizer(transport, optserve.Adadelta(), gradients(0), **options)
            opt = before.optimizer(transport, transport=transport)
            assert [bits(opt.step(gradients(seed))) for seed in range(5)] == expected[:5]
            opt.save_checkpoint("five")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with optserve.local_server(tmp_path, backend=BACKEND) as server, optserve.connect(server.target) as after:
        for transport in ("shm", "grpc"):
            opt = after.optimizer(transport, transport=transport)
            assert bits(opt.replay()) == expected[4]
            assert [bits(opt.step(gradients(seed))) for seed in (5, 6)] == expected[5:7]
            opt.update(schedule=None, clipping=None, groups=())
            opt.restore_checkpoint("five")
            assert {"schedule": opt.schedule, "clipping": opt.clipping, "groups": opt.groups} == options
            assert [bits(opt.step(gradients(seed))) for seed in range(5, 8)] == expected[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": optserve.InverseTime(decay=0.0)}, "decay of the inverse time schedule is 0.0"),
        ({"schedule": optserve.InverseTime(decay=math.nan)}, "decay of the inverse time schedule is nan"),
        ({"schedule": optserve.Exponential(rate=1.5)}, "rate of the exponential schedule is 1.5"),
        ({"schedule": optserve.Exponential(rate=0.0)}, "rate of the exponential schedule is 0.0"),
        ({"schedule": optserve.AtSteps(rate=0.5, milestones=())}, "milestones of the step schedule is empty"),
        ({"schedule": optserve.AtSteps(rate=0.5, milestones=(3, 3))}, "not strictly increasing"),
        ({"schedule": optserve.Cosine(period_steps=0)}, "period_steps of the cosine schedule is 0"),
        ({"schedule": optserve.Cosine(period_steps=1, floor=2.0)}, "floor of the cosine schedule is 2.0"),
        ({"clipping": optserve.Clipping(norm=0.0)}, "bound of clipping is 0.0"),
        ({"clipping": optserve.Clipping(value=-1.0)}, "bound of clipping is -1.0"),
        ({"clipping": optserve.Clipping(global_norm=math.inf)}, "bound of clipping is inf"),
        ({"groups": [optserve.Group(["x"], {})]}, "There is no parameter 'x'"),
        ({"groups": [optserve.Group(["w"], {}), optserve.Group(["w"], {})]}, "'w' is in two groups"),
        ({"groups": [optserve.Group([], {})]}, "A group has at least one parameter"),
        ({"groups": [optserve.Group(["w"], {"rho": 2.0})]}, "adadelta.rho is 2.0"),
        ({"groups": [optserve.Group(["w"], {"mu": 2.0})]}, "adadelta has no 'mu'; it has rho, eps, learning_rate"),
    ],
)
def test_what_is_impossible_is_refused_at_creation_and_later(client, name, options, message):
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        client.create_optimizer(name, optserve.Adadelta(), gradients(0), **options)
    opt = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        opt.update(**options)
    assert (opt.schedule, opt.clipping, opt.groups) == (None, None, ())


def test_clipping_is_one_of_three():
    for bounds in ({}, {"value": 1.0, "norm": 1.0}):
        with pytest.raises(optserve.InvalidArgumentError, match="one of value, norm and global_norm"):
            optserve.Clipping(**bounds)


def test_vsgd_has_no_learning_rate_to_anneal(client, name):
    with pytest.raises(optserve.InvalidArgumentError, match="vsgd has no learning rate"):
        client.create_optimizer(name, optserve.Vsgd(), gradients(0), schedule=optserve.Cosine(period_steps=5))


# --- The contract


def test_a_result_tells_the_norm_that_clipping_has_seen(stub, name):
    optimizer = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd(learning_rate=1.0)),
        parameters=[optimizer_pb2.Parameter(name="x", shape=[1]), optimizer_pb2.Parameter(name="y", shape=[1])],
        clipping=optimizer_pb2.Clipping(global_norm=1.0),
    )
    made = stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer)).optimizer
    with stream(stub, made.name) as steps:
        steps.send(begin(), chunk(0, 0, np.array([3, 4], np.float32).tobytes()), commit())
        payload, result = steps.reply()
    assert result.gradient_norm == 5.0
    np.testing.assert_allclose(np.frombuffer(payload, "f4"), [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"schedule": algorithms_pb2.Schedule()}, "optimizer.schedule"),
        ({"clipping": optimizer_pb2.Clipping()}, "optimizer.clipping"),
        (
            {
                "groups": [
                    optimizer_pb2.ParameterGroup(
                        parameters=["x"], algorithm=algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd())
                    )
                ]
            },
            "optimizer.groups[0].algorithm",
        ),
    ],
)
def test_half_a_setting_is_refused(stub, name, settings, field):
    optimizer = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta()),
        parameters=[optimizer_pb2.Parameter(name="x", shape=[1])],
        **settings,
    )
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", field):
        stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer))
