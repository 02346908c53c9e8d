"""Weight decay on the server: as torch's AdamW has it, and as its other optimizers have it."""

import math
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import optserve
from backend_under_test import BACKENDS, IN_PROCESS
from durability.folder import F4, F8, PARAMETERS, Server, step
from optserve.v1 import optimizer_pb2
from optserve_server.domain.errors import OptserveError
from optserve_server.numerics import rules
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.layout import Layout, Operand
from optserve_server.numerics.schedule import Cosine
from optserve_server.numerics.settings import Group, Settings, UnknownSettingError
from optserve_server.numerics.weight_decay import DecayKind
from service.wire_client import create, refused

STEPS = 50
SHAPES = {"w": (7, 5), "b": (5,)}
KINDS = [optserve.TimesLearningRate(0.25), optserve.L2(0.25)]

Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def by_torch(make: Optimizer, decay: float, schedule: Cosine | None = None) -> dict[str, np.ndarray]:
    """x after some steps of torch's optimizer, which decays no biases; elements of gradients are clipped at 1."""
    x = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in arrays(0).items()}
    optimizer = make([{"params": [x["w"]], "weight_decay": decay}, {"params": [x["b"]], "weight_decay": 0.0}])
    factors = schedule or Cosine(period_steps=1, floor=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.factor)
    for turn in range(STEPS):
        for name, gradient in arrays(turn + 1).items():
            x[name].grad = torch.from_numpy(gradient)
        torch.nn.utils.clip_grad_value_(list(x.values()), 1.0)
        optimizer.step()
        scheduler.step()
    return {name: value.detach().numpy() for name, value in x.items()}


def by_server(client: optserve.Client, name: str, algorithm, decay, **settings) -> dict[str, np.ndarray]:
    opt = client.create_optimizer(
        name, algorithm, arrays(0), hosted=True, weight_decay=decay, clipping=optserve.Clipping(value=1.0),
        groups=[optserve.Group(["b"], weight_decay=0.0)], **settings,
    )  # fmt: skip
    for turn in range(STEPS):
        opt.step(arrays(turn + 1), reply="nothing")
    return opt.pull_parameters().arrays


@pytest.fixture(scope="module", params=BACKENDS)
def server_client(request):
    with optserve.local_server(backend=request.param) as server, optserve.connect(server.target) as client:
        yield client


def test_decay_times_the_learning_rate_is_that_of_torchs_adamw_under_a_schedule(server_client, name):
    decay, schedule = 0.5, optserve.Cosine(period_steps=30, floor=0.1, warmup_steps=5)
    made = by_server(
        server_client, name, optserve.AdamW(learning_rate=0.1), optserve.TimesLearningRate(decay), schedule=schedule
    )
    expected = by_torch(
        lambda groups: torch.optim.AdamW(groups, lr=0.1), decay, Cosine(period_steps=30, floor=0.1, warmup_steps=5)
    )
    for key, value in expected.items():
        np.testing.assert_allclose(made[key], value, rtol=1e-12, atol=1e-14)


ADDED: list[tuple[optserve.Algorithm, Optimizer]] = [
    (optserve.Adam(learning_rate=0.1), lambda groups: torch.optim.Adam(groups, lr=0.1)),
    (optserve.Sgd(learning_rate=0.1), lambda groups: torch.optim.SGD(groups, lr=0.1)),
    (
        optserve.SgdMomentum(learning_rate=0.1, momentum=0.9, nesterov=True),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    ),
    (optserve.Adadelta(rho=0.9, eps=1e-6), lambda groups: torch.optim.Adadelta(groups, rho=0.9, eps=1e-6)),
    (optserve.Rmsprop(learning_rate=0.1), lambda groups: torch.optim.RMSprop(groups, lr=0.1)),
]


@pytest.mark.parametrize(("algorithm", "make"), ADDED, ids=lambda value: getattr(value, "name", ""))
def test_decay_that_is_added_to_the_gradient_is_that_of_torch_after_clipping(server_client, name, algorithm, make):
    made = by_server(server_client, name, algorithm, optserve.L2(0.5))
    for key, value in by_torch(make, 0.5).items():
        np.testing.assert_allclose(made[key], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_plain_number_makes_the_decay_fixed_again(client, name, kind):
    opt = client.create_optimizer(name, optserve.Sgd(1.0), arrays(0), hosted=True, weight_decay=kind)
    assert opt.weight_decay == kind
    opt.update(learning_rate=0.5)
    assert opt.weight_decay == kind
    opt.update(weight_decay=0.125)
    assert opt.weight_decay == 0.125
    still = {key: np.zeros_like(value) for key, value in arrays(0).items()}
    after = opt.step(still, reply="parameters")
    assert all(np.array_equal(after[key], value - 0.125 * value) for key, value in arrays(0).items())
    opt.update(weight_decay=kind)
    assert opt.weight_decay == kind


def test_a_stale_gradient_divides_only_what_follows_the_learning_rate(client, name):
    x, still = {"w": np.ones(2)}, {"w": np.zeros(2)}
    for kind, expected in ((optserve.TimesLearningRate(0.5), 0.5 - 0.25 * 0.5), (optserve.L2(0.5), 0.5 - 0.5 * 0.25)):
        own = f"{name}-{kind.kind.replace('_', '-')}"
        consistency = optserve.Async(scale_by_staleness=True)
        client.create_optimizer(own, optserve.Sgd(1.0), x, hosted=True, weight_decay=kind, consistency=consistency)
        with client.worker(own, "quick") as quick, client.worker(own, "slow") as slow:
            slow.pull()
            quick.pull()
            assert quick.step(still)["w"][0] == 0.5
            assert slow.step(still)["w"][0] == expected


def test_a_step_of_its_own_settings_decays_by_them(client, name):
    x, still = {"w": np.ones(2)}, {"w": np.zeros(2)}
    opt = client.create_optimizer(name, optserve.Sgd(1.0), x, hosted=True, weight_decay=optserve.TimesLearningRate(0.5))
    assert opt.step(still, hyperparameters={"learning_rate": 0.5}, reply="parameters")["w"][0] == 0.75
    assert opt.step(still, hyperparameters={"weight_decay": 0.0}, reply="parameters")["w"][0] == 0.75
    with pytest.raises(optserve.InvalidArgumentError, match=r"it is 1, but must be less than 1, in the settings"):
        opt.step(still, hyperparameters={"learning_rate": 2.0})
    opt.update(weight_decay=optserve.L2(0.25))
    assert opt.step(still, hyperparameters={"weight_decay": 2.0}, reply="parameters")["w"][0] == -0.75
    assert opt.step(still, reply="parameters")["w"][0] == -0.75 * 0.75


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_kind_travels_with_a_state(client, name, kind, tmp_path):
    groups = [optserve.Group(["b"], {}, weight_decay=0.5)]
    opt = client.create_optimizer(name, optserve.Adam(), arrays(0), hosted=True, weight_decay=kind, groups=groups)
    opt.step(arrays(1))
    state = opt.export_state()
    state.save(tmp_path / "state.safetensors")
    assert optserve.OptimizerState.load(tmp_path / "state.safetensors") == state
    twin = client.create_optimizer_from_state(f"{name}-2", state)
    assert twin.weight_decay == kind
    other = client.create_optimizer(f"{name}-3", optserve.Adam(), arrays(0), hosted=True)
    other.import_state(state)
    for turn in (2, 3):
        steps = [one.step(arrays(turn), reply="parameters") for one in (opt, twin, other)]
        assert all(steps[0][key].tobytes() == made[key].tobytes() for made in steps[1:] for key in SHAPES)


@pytest.mark.parametrize(
    ("decay", "algorithm", "message"),
    [
        (optserve.L2(-0.1), optserve.Sgd(), r"must lie in \[0, inf\)"),
        (optserve.L2(math.nan), optserve.Sgd(), r"must lie in \[0, inf\)"),
        (optserve.L2(math.inf), optserve.Sgd(), r"must lie in \[0, inf\)"),
        (optserve.L2(1e31), optserve.Sgd(), "added to the gradient it is at most"),
        (optserve.TimesLearningRate(-1.0), optserve.Sgd(), r"must lie in \[0, inf\)"),
        (optserve.TimesLearningRate(10.0), optserve.Sgd(0.1), "times the learning rate 0.1 it is 1, but must be less"),
        (optserve.TimesLearningRate(0.1), optserve.Vsgd(), "vsgd has no learning rate by which"),
        (optserve.L2("0.1"), optserve.Sgd(), "weight_decay cannot be"),  # pyright: ignore[reportArgumentType]
    ],
    ids=repr,
)
def test_an_impossible_decay_is_refused(client, name, decay, algorithm, message):
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        client.create_optimizer(name, algorithm, arrays(0), hosted=True, weight_decay=decay)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_server_must_hold_the_parameters(client, name, kind):
    with pytest.raises(optserve.InvalidArgumentError, match="needs parameters that the server holds"):
        client.create_optimizer(name, optserve.Sgd(), arrays(0), weight_decay=kind)


def test_a_larger_learning_rate_that_decay_does_not_allow_is_refused(client, name):
    decay = optserve.TimesLearningRate(0.5)
    opt = client.create_optimizer(name, optserve.Sgd(1.0), arrays(0), hosted=True, weight_decay=decay)
    with pytest.raises(optserve.InvalidArgumentError, match="must be less than 1"):
        opt.update(learning_rate=2.0)
    with pytest.raises(optserve.InvalidArgumentError, match="must be less than 1"):
        opt.update(groups=[optserve.Group(["b"], {"learning_rate": 3.0})])
    assert opt.algorithm == optserve.Sgd(1.0)


def test_a_kind_that_the_server_does_not_know_is_refused(stub, name):
    settings: Any = {"mode": optimizer_pb2.MODE_HOSTED, "weight_decay_kind": 77}
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "optimizer.weight_decay_kind"):
        create(stub, name, {"x": (2,)}, **settings)


CLIPPED = Settings(
    rules.Adam(learning_rate=0.25),
    Cosine(period_steps=6, floor=0.25),
    Clipping("global_norm", 2.0),
    (Group((1,), {"learning_rate": 0.125}, 0.75),),
    hosted=True,
    weight_decay=0.5,
)


@pytest.mark.parametrize("backend", IN_PROCESS)
@pytest.mark.parametrize("kind", DecayKind)
@pytest.mark.parametrize("snapshot_after", [-1, 2])
def test_recovery_makes_the_same_bits(tmp_path, kind, backend, snapshot_after):
    settings = Settings(**{**vars(CLIPPED), "decay_kind": kind})

    def made(server: Server):
        item = server.optimizers.create("a", Layout(PARAMETERS), settings, "creation")
        upload = item.steps.begin_placement("upload")
        for index, parameter in enumerate(PARAMETERS):
            x = np.random.default_rng(index).standard_normal(parameter.size).astype(parameter.dtype)
            upload.stage(index, 0, x.tobytes(), Operand.PARAMETER)
        upload.commit()
        upload.close()
        return item

    def content(item) -> list[bytes]:
        state = item.state
        slots = [state.backend.to_host(slot) for dtype in (F4, F8) for slot in state.slots[dtype]]
        return [array.tobytes() for array in (*slots, state.parameters[F4], state.parameters[F8])]

    server, straight = Server(tmp_path / "a", backend=backend), Server(tmp_path / "b", backend="numpy")
    item, other = made(server), made(straight)
    for number in range(6):
        assert step(item, number) == step(other, number)
        if number == snapshot_after:
            server.folder.snapshot()
    server.die()
    again = Server(tmp_path / "a", backend=backend)
    item = again.optimizers.get("a")
    assert item.state.settings == settings
    assert content(item) == content(other)
    assert step(item, 6) == step(other, 6)
    assert content(item) == content(other)
    again.die()
    straight.die()


def test_on_disk_the_fixed_kind_is_a_number_and_the_others_name_themselves():
    told = CLIPPED.to_json()
    assert told["weight_decay"] == 0.5
    added = Settings(**{**vars(CLIPPED), "decay_kind": DecayKind.L2})
    assert added.to_json()["weight_decay"] == {"kind": "l2", "factor": 0.5}
    assert Settings.from_json(added.to_json()) == added
    for written in ({"kind": "l1", "factor": 0.5}, {"kind": "l2", "factor": 0.5, "norm": 3}):
        with pytest.raises(UnknownSettingError, match=r"weight.decay"):
            Settings.from_json(told | {"weight_decay": written})


def test_decay_that_would_make_x_infinite_is_refused_whole(client, name):
    x = {"w": np.full(4, 3e38, np.float32)}
    opt = client.create_optimizer(name, optserve.Sgd(1.0), x, hosted=True, weight_decay=optserve.L2(100.0))
    with pytest.raises(optserve.InvalidArgumentError, match="would be"):
        opt.step({"w": np.ones(4, np.float32)})
    assert opt.pull_parameters().arrays["w"].tobytes() == x["w"].tobytes()
    assert opt.current_step == 0


def test_settings_that_are_impossible_are_refused_before_the_state_changes():
    with pytest.raises(OptserveError, match="must be less than 1"):
        Settings(rules.Sgd(1.0), hosted=True, weight_decay=1.0, decay_kind=DecayKind.TIMES_LEARNING_RATE).check()
