"""States between the service and torch.optim, whose optimizers go on with them."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

import optserve
import optserve.torch

PARAMETERS = {"w": (40, 30), "b": (30,), "scale": (), "nothing": (0, 3)}
METHODS = [
    optserve.Adadelta(rho=0.9, eps=1e-5, learning_rate=0.7),
    optserve.Adagrad(learning_rate=0.05),
    optserve.Momentum(learning_rate=0.03, rho=0.8),
    optserve.WindowedRms(learning_rate=0.002, rho=0.95, eps=0.0, outer_eps=1e-7),
    optserve.Sgd(learning_rate=0.2),
    optserve.SgdMomentum(learning_rate=0.03, momentum=0.8, nesterov=True),
    optserve.SgdMomentum(learning_rate=0.03, momentum=0.7, dampening=0.4),
    optserve.Rmsprop(learning_rate=0.002, rho=0.95, eps=1e-7, momentum=0.6),
    optserve.CenteredRmsprop(learning_rate=0.002, rho=0.95, eps=1e-7, momentum=0.6),
    optserve.Adam(learning_rate=0.01, beta1=0.8, beta2=0.95, eps=1e-7),
    optserve.AdamW(learning_rate=0.01),
    optserve.Nadam(learning_rate=0.01, beta1=0.95, momentum_decay=0.1),
]


@pytest.fixture
def doubles():
    """Counters and products of torch's own in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in PARAMETERS.items()}


RATE = {"lr": "learning_rate"}
RMSPROP = RATE | {"alpha": "rho", "eps": "eps", "momentum": "momentum"}
TORCH: dict[type[optserve.Algorithm], tuple[Any, dict[str, str]]] = {
    optserve.Adadelta: (torch.optim.Adadelta, RATE | {"rho": "rho", "eps": "eps"}),
    optserve.Adagrad: (torch.optim.Adagrad, RATE | {"eps": "eps"}),
    optserve.Momentum: (torch.optim.SGD, RATE | {"momentum": "rho"}),
    optserve.WindowedRms: (torch.optim.RMSprop, RATE | {"alpha": "rho", "eps": "outer_eps"}),
    optserve.Sgd: (torch.optim.SGD, RATE),
    optserve.SgdMomentum: (torch.optim.SGD, RATE | {name: name for name in ("momentum", "dampening", "nesterov")}),
    optserve.Rmsprop: (torch.optim.RMSprop, RMSPROP),
    optserve.CenteredRmsprop: (torch.optim.RMSprop, RMSPROP),
    optserve.Adam: (torch.optim.Adam, RATE | {"eps": "eps"}),
    optserve.AdamW: (torch.optim.AdamW, RATE | {"eps": "eps"}),
    optserve.Nadam: (torch.optim.NAdam, RATE | {"eps": "eps", "momentum_decay": "momentum_decay"}),
}
"""torch's optimizer of a method, and its settings with our names for them, but for `betas`."""


def torch_optimizer(method: optserve.Algorithm, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    kind, settings = TORCH[type(method)]
    given = {theirs: getattr(method, ours) for theirs, ours in settings.items()}
    if hasattr(method, "beta1"):
        given["betas"] = getattr(method, "beta1"), getattr(method, "beta2")  # noqa: B009 - not every method has them
    if isinstance(method, optserve.AdamW):
        given["weight_decay"] = 0.0
    return kind(parameters, centered=True, **given) if method.name == "centered_rmsprop" else kind(parameters, **given)


class TorchRun:
    def __init__(self, method: optserve.Algorithm, values: dict[str, np.ndarray]) -> None:
        self.parameters = {
            name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in values.items()
        }
        self.optimizer = torch_optimizer(method, list(self.parameters.values()))

    def step(self, given: dict[str, np.ndarray]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(np.array(given[name]))
        self.optimizer.step()

    def values(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}


def close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_torch_run_enters_the_service_and_leaves_it_again(client, name, method):
    start = gradients(99, "float64")
    whole = TorchRun(method, start)
    for seed in range(12):
        whole.step(gradients(seed, "float64"))
    first = TorchRun(method, start)
    for seed in range(4):
        first.step(gradients(seed, "float64"))
    state = optserve.torch.from_state_dict(first.optimizer.state_dict(), first.parameters)
    assert state.algorithm == method
    opt = client.create_optimizer(name, state.algorithm, state.parameters)
    opt.import_state(state)
    x = first.values()
    for seed in range(4, 8):
        for key, update in opt.step(gradients(seed, "float64")).items():
            x[key] = x[key] + update
    last = TorchRun(method, x)
    exported = opt.export_state()
    assert exported.step == (
        8 if "sgd" not in method.name and method.name != "momentum" else 4
    )  # torch's SGD counts no steps
    last.optimizer.load_state_dict(optserve.torch.to_state_dict(exported))
    for seed in range(8, 12):
        last.step(gradients(seed, "float64"))
    close(last.values(), whole.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_state_dict_has_torchs_keys_and_settings(client, name, method):
    run = TorchRun(method, gradients(0))
    run.step(gradients(1))
    expected = run.optimizer.state_dict()
    opt = client.create_optimizer(name, method, gradients(0))
    opt.step(gradients(1))
    actual = optserve.torch.to_state_dict(opt.export_state())
    names = {key for entry in expected["state"].values() for key in entry}
    assert {key for entry in actual["state"].values() for key in entry} == names - (
        {"momentum_buffer"} if method.name == "sgd" else set()
    )
    assert set(actual["param_groups"][0]) <= set(expected["param_groups"][0])
    for key, value in actual["param_groups"][0].items():
        assert value == expected["param_groups"][0][key], key
    again = optserve.torch.from_state_dict(actual, run.parameters)
    assert again.algorithm == method
    for parameter, slots in opt.export_state().slots.items():
        for slot, array in slots.items():
            np.testing.assert_allclose(again.slots[parameter][slot], array, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adadelta(p, weight_decay=0.1), "no weight_decay; it is 0.1"),
        (lambda p: torch.optim.Adadelta(p, maximize=True), "no maximize"),
        (lambda p: torch.optim.Adagrad(p, lr_decay=0.1), "no lr_decay"),
        (torch.optim.Adamax, "does not belong to Adadelta, Adagrad, RMSprop, SGD, Adam, AdamW or NAdam"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "no amsgrad"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), r"no weight_decay; it is 0.1 in the state_dict\.$"),
        (
            torch.optim.AdamW,
            "it is 0.01 in the state_dict. An optimizer that holds x has a weight_decay of its own, lr",
        ),
        (
            lambda p: torch.optim.RMSprop([{"params": p[:1]}, {"params": p[1:], "centered": True}]),
            "of different methods",
        ),
        (lambda p: torch.optim.Adadelta(p[:2]), "has 2 parameters, not 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_service_cannot_continue_is_refused(make, message):
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in PARAMETERS.items()}
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        optserve.torch.from_state_dict(make(list(parameters.values())).state_dict(), parameters)


def test_what_torch_cannot_continue_is_refused(client, name):
    inside = client.create_optimizer(name, optserve.WindowedRms(), gradients(0))
    with pytest.raises(optserve.InvalidArgumentError, match=re.escape("WindowedRms(eps=0, outer_eps=…)")):
        optserve.torch.to_state_dict(inside.export_state())
    still = client.create_optimizer(f"{name}-2", optserve.Momentum(learning_rate=0.0), gradients(0))
    with pytest.raises(optserve.InvalidArgumentError, match="learning rate of 0"):
        optserve.torch.to_state_dict(still.export_state())


def test_state_dicts_that_cannot_be_understood_are_refused():
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in PARAMETERS.items()}
    good = torch.optim.SGD(list(parameters.values()), lr=0.1, momentum=0.9).state_dict()
    for spoil, message in (
        (lambda s: s["param_groups"].clear(), "no parameter group"),
        (lambda s: s["param_groups"][0].update(trust_coefficient=0.1), "no trust_coefficient; it is 0.1"),
        (lambda s: s["state"].update({0: {"momentum_buffer": torch.ones(3)}}), "momentum_buffer of 'w' is"),
        (
            lambda s: (
                s["param_groups"][0].update(lr=0.0),
                s["state"].update({0: {"momentum_buffer": torch.ones(PARAMETERS["w"])}}),
            ),
            "cannot be computed for a learning rate of 0",
        ),
    ):
        spoilt = {"state": dict(good["state"]), "param_groups": [dict(group) for group in good["param_groups"]]}
        spoil(spoilt)
        with pytest.raises(optserve.InvalidArgumentError, match=message):
            optserve.torch.from_state_dict(spoilt, parameters)
    halves = {"w": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    with pytest.raises(optserve.InvalidArgumentError, match=r"'w' is torch\.bfloat16"):
        optserve.torch.from_state_dict(torch.optim.SGD(list(halves.values()), lr=0.1).state_dict(), halves)


def test_methods_that_torch_has_not_are_refused(client, name):
    for method in (optserve.Vsgd(), optserve.DiagonalHessian()):
        made = client.create_optimizer(f"{name}-{method.name.replace('_', '-')}", method, gradients(0))
        with pytest.raises(optserve.InvalidArgumentError, match=rf"torch\.optim has no {type(method).__name__}"):
            optserve.torch.to_state_dict(made.export_state())


# --- Groups


GROUPS = [
    (METHODS[0], {"rho": 0.8, "learning_rate": 0.2}),
    (METHODS[1], {"learning_rate": 0.5}),
    (METHODS[2], {"learning_rate": 0.001, "rho": 0.5}),
    (METHODS[2], {"rho": 0.0}),
    (METHODS[3], {"rho": 0.5, "outer_eps": 1e-3}),
    (METHODS[4], {"learning_rate": 0.01}),
    (METHODS[5], {"nesterov": False, "dampening": 0.5}),
    (METHODS[7], {"momentum": 0.2}),
    (METHODS[8], {"eps": 1e-3}),
    (METHODS[9], {"beta1": 0.5}),
    (METHODS[10], {"learning_rate": 0.5, "beta2": 0.5}),
    (METHODS[11], {"momentum_decay": 1.0}),
]


def torch_class(method: optserve.Algorithm) -> Any:
    return type(torch_optimizer(method, [torch.nn.Parameter(torch.ones(1))]))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("method", "overrides"), GROUPS, ids=lambda item: getattr(item, "name", ""))
def test_groups_go_to_torch_and_come_back(client, name, method, overrides, dtype):
    groups = (optserve.Group(("b", "scale"), overrides),)
    opt = client.create_optimizer(name, method, gradients(0, dtype), groups=groups)
    for seed in range(3):
        opt.step(gradients(seed, dtype))
    state = opt.export_state()
    params = {key: torch.nn.Parameter(torch.from_numpy(value)) for key, value in gradients(7, dtype).items()}
    theirs = torch_class(method)(optserve.torch.param_groups(state, params), lr=1.0)
    theirs.load_state_dict(optserve.torch.to_state_dict(state))
    # torch keeps the bits, but for Momentum's change of units; and names say whose they are, in whatever order.
    back = optserve.torch.from_state_dict(theirs.state_dict(), dict(reversed(params.items())))
    assert (back.algorithm, back.groups) == (method, groups)
    for key, slots in state.slots.items():
        for slot, array in slots.items():
            if method.name == "momentum":
                np.testing.assert_allclose(back.slots[key][slot], array, rtol=np.finfo(dtype).eps)
            else:
                assert back.slots[key][slot].tobytes() == array.tobytes()
    for seed in range(3, 6):
        before = {key: param.detach().numpy().copy() for key, param in params.items()}
        for key, param in params.items():
            param.grad = torch.from_numpy(gradients(seed, dtype)[key])
        theirs.step()
        for key, update in opt.step(gradients(seed, dtype)).items():
            np.testing.assert_allclose(
                params[key].detach().numpy(),
                before[key] + update,
                rtol=1e-6 if dtype == "float32" else 1e-14,
                atol=1e-7,
            )
    # And what torch has done meanwhile goes on here as there.
    again = client.create_optimizer_from_state(f"{name}-2", optserve.torch.from_state_dict(theirs.state_dict(), params))
    ours, its = again.step(gradients(8, dtype)), opt.step(gradients(8, dtype))
    for key, update in ours.items():
        np.testing.assert_allclose(update, its[key], rtol=1e-4 if dtype == "float32" else 1e-12, atol=1e-7)


def test_a_group_of_all_parameters_needs_no_other(client, name):
    groups = [optserve.Group(["b", "w"], {"rho": 0.5}), optserve.Group(["scale", "nothing"], {"rho": 0.25})]
    state = client.create_optimizer(name, optserve.Adadelta(), gradients(0), groups=groups).export_state()
    saved = optserve.torch.to_state_dict(state)
    assert [(group["rho"], group["param_names"]) for group in saved["param_groups"]] == [
        (0.5, ["b", "w"]),
        (0.25, ["scale", "nothing"]),
    ]
    params = {key: torch.nn.Parameter(torch.ones(shape)) for key, shape in PARAMETERS.items()}
    back = optserve.torch.from_state_dict(saved, params)
    assert isinstance(back.algorithm, optserve.Adadelta)
    assert (back.algorithm.rho, back.groups) == (0.5, (optserve.Group(("scale", "nothing"), {"rho": 0.25}),))
    with pytest.raises(optserve.InvalidArgumentError, match="no parameter 'b'"):
        optserve.torch.param_groups(state, {"w": params["w"]})


def test_param_names_say_whose_a_state_is():
    a, b = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = torch.optim.Adadelta([("b", b), ("a", a)])
    a.grad, b.grad = torch.full_like(a, 1.0), torch.full_like(b, 5.0)
    optimizer.step()
    saved = optimizer.state_dict()
    state = optserve.torch.from_state_dict(saved, {"a": a, "b": b})
    for key, param in {"a": a, "b": b}.items():
        assert state.slots[key]["square_avg"].tobytes() == optimizer.state[param]["square_avg"].numpy().tobytes()
    for params in ({"a": a, "c": b}, {"module.a": a, "module.b": b}):
        with pytest.raises(optserve.InvalidArgumentError, match="names in the state_dict are not those of `params`"):
            optserve.torch.from_state_dict(saved, params)
    saved["param_groups"][0]["param_names"] = ["a"]
    with pytest.raises(optserve.InvalidArgumentError, match="names in the state_dict"):
        optserve.torch.from_state_dict(saved, {"a": a, "b": b})


# --- Steps of each parameter


COUNTED = [
    optserve.Adam(learning_rate=0.01),
    optserve.AdamW(learning_rate=0.01),
    optserve.Nadam(learning_rate=0.01),
    optserve.SgdMomentum(learning_rate=0.01, dampening=0.5),
]
TURNS = [{"w", "b"}, {"w"}, {"w", "scale"}, {"b"}, {"w", "b"}]
"""What takes part in each step; `nothing` in none."""


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", COUNTED, ids=lambda method: method.name)
def test_each_parameter_has_its_own_steps_in_torch_too(client, name, method):
    start = gradients(99, "float64")
    run, opt = TorchRun(method, start), client.create_optimizer(name, method, start)

    def step_both(torch_run: TorchRun, served: optserve.Optimizer, seed: int, part: set[str]) -> None:
        given = {key: value for key, value in gradients(seed, "float64").items() if key in part}
        before = torch_run.values()
        for key, parameter in torch_run.parameters.items():
            parameter.grad = torch.from_numpy(given[key]) if key in given else None
        torch_run.optimizer.step()
        for key, update in served.step(given, partial=True).items():
            np.testing.assert_allclose(before[key] + update, torch_run.values()[key], rtol=1e-12, atol=1e-14)

    for seed, part in enumerate(TURNS):
        step_both(run, opt, seed, part)
    state = opt.export_state()
    assert state.parameter_steps == {"w": 4, "b": 3, "scale": 1, "nothing": 0}
    saved = optserve.torch.to_state_dict(state)
    if method.name == "sgd_momentum":
        assert 3 not in saved["state"]
        # A buffer says that there was a step, not how many.
        counted = {"w": 1, "b": 1, "scale": 1, "nothing": 0}
    else:
        counted = state.parameter_steps
        assert [saved["state"][index]["step"].item() for index in range(4)] == [4, 3, 1, 0]
    other = TorchRun(method, run.values())
    other.optimizer.load_state_dict(saved)
    for source in (run, other):
        back = optserve.torch.from_state_dict(source.optimizer.state_dict(), source.parameters, method=type(method))
        assert back.parameter_steps == counted
    again = client.create_optimizer_from_state(f"{name}-2", back)
    step_both(other, again, 50, {"w", "b", "scale", "nothing"})
    step_both(run, opt, 50, {"w", "b", "scale", "nothing"})
    close(other.values(), run.values())


def test_adamw_decays_the_parameters_that_the_server_holds_as_torch_does(client, name):
    start = gradients(99, "float64")
    run = TorchRun(optserve.AdamW(learning_rate=0.02), start)
    run.optimizer.param_groups[0]["weight_decay"] = 0.1
    opt = client.create_optimizer(name, optserve.AdamW(learning_rate=0.02), start, hosted=True, weight_decay=0.002)
    for seed in range(50):
        run.step(gradients(seed, "float64"))
        opt.step(gradients(seed, "float64"))
    close(dict(opt.pull_parameters().arrays), run.values())


def test_a_product_of_nadam_that_other_settings_have_made_is_refused():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.NAdam([param])
    for turn in range(3):
        if turn == 2:
            assert optserve.torch.from_state_dict(optimizer.state_dict(), {"w": param}).parameter_steps == {"w": 2}
            optimizer.param_groups[0]["betas"] = (0.5, 0.999)
        param.grad = torch.ones(3)
        optimizer.step()
    with pytest.raises(optserve.InvalidArgumentError, match=r"mu_product of 'w' is .*, and would be .* at step 3 with"):
        optserve.torch.from_state_dict(optimizer.state_dict(), {"w": param})


def test_steps_that_differ_come_back_exactly():
    specs = {key: optserve.TensorSpec((2,)) for key in ("a", "b")}
    slots = {key: {slot: np.zeros(2, np.float32) for slot in ("grad_avg", "square_avg")} for key in specs}
    steps = {"a": 2**24 + 1, "b": 3}
    state = optserve.OptimizerState(2**24 + 5, optserve.Adam(), specs, slots, parameter_steps=steps)
    params = {key: torch.nn.Parameter(torch.zeros(2)) for key in specs}
    back = optserve.torch.from_state_dict(optserve.torch.to_state_dict(state), params)
    assert back.parameter_steps == steps
    # An earlier version has not written them: then all have taken part in all steps.
    saved = optserve.torch.to_state_dict(dataclasses.replace(state, parameter_steps=None))
    assert optserve.torch.from_state_dict(saved, params).parameter_steps == {"a": 2**24 + 5, "b": 2**24 + 5}


@pytest.mark.parametrize(
    ("make", "simplest", "method"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), optserve.Momentum, optserve.SgdMomentum),
        (lambda p: torch.optim.SGD(p, lr=0.1), optserve.Sgd, optserve.SgdMomentum),
        (torch.optim.RMSprop, optserve.WindowedRms, optserve.Rmsprop),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0), optserve.AdamW, optserve.Adam),
        (
            lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "nesterov": True}], momentum=0.9),
            optserve.SgdMomentum,
            optserve.SgdMomentum,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_settings_of_several_methods_are_of_the_simplest_or_of_the_one_asked_for(client, name, make, simplest, method):
    parameters = {key: torch.nn.Parameter(torch.ones(shape)) for key, shape in PARAMETERS.items()}
    optimizer = make(list(parameters.values()))

    def step(seed: int) -> None:
        for key, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients(seed)[key])
        optimizer.step()

    step(0)
    assert type(optserve.torch.from_state_dict(optimizer.state_dict(), parameters).algorithm) is simplest
    state = optserve.torch.from_state_dict(optimizer.state_dict(), parameters, method=method)
    assert type(state.algorithm) is method
    updates = client.create_optimizer_from_state(name, state).step(gradients(1))
    before = {key: parameter.detach().numpy().copy() for key, parameter in parameters.items()}
    step(1)
    for key, update in updates.items():
        np.testing.assert_allclose(before[key] + update, parameters[key].detach().numpy(), rtol=1e-6, atol=1e-7)
    with pytest.raises(optserve.InvalidArgumentError, match=rf"{simplest.__name__}, not of Nadam"):
        optserve.torch.from_state_dict(optimizer.state_dict(), parameters, method=optserve.Nadam)


# --- What torch keeps beside the method


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=10),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, min_lr=0.1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_state_dict_of_a_run_with_a_scheduler_has_the_present_rate(scheduler):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([param], lr=0.5, momentum=0.9)
    annealing = SCHEDULERS[scheduler](optimizer)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        annealing.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    state = optserve.torch.from_state_dict(optimizer.state_dict(), {"x": param}, step=3)
    (group,) = optimizer.param_groups
    assert state.algorithm == optserve.Momentum(learning_rate=group["lr"], rho=group["momentum"])
    assert state.step == 3
    before = param.detach().clone()
    optimizer.step()
    expected = (param - before).detach().numpy()
    assert isinstance(state.algorithm, optserve.Momentum)
    ours = state.algorithm.rho * state.slots["x"]["momentum"] - state.algorithm.learning_rate
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_a_schedule_goes_on_at_the_step_that_torch_has_not_counted(client, name):
    schedule = optserve.AtSteps(rate=0.1, milestones=(3,))
    one = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"x": np.ones(2)}, schedule=schedule)
    for _ in range(3):
        one.step({"x": np.ones(2)})
    left = one.export_state()
    saved = optserve.torch.to_state_dict(left.without("schedule"))
    params = {"x": torch.nn.Parameter(torch.ones(2, dtype=torch.float64))}
    back = optserve.torch.from_state_dict(saved, params, step=left.step)
    one.import_state(back)
    assert one.schedule == schedule
    np.testing.assert_allclose(one.step({"x": np.ones(2)})["x"], [-0.1, -0.1])


@pytest.mark.parametrize(
    ("options", "name_of_it"),
    [
        ({"schedule": optserve.Cosine(period_steps=9)}, "schedule"),
        ({"clipping": optserve.Clipping(value=1.0)}, "clipping"),
        ({"hosted": True, "weight_decay": 0.5}, "weight_decay"),
        ({"hosted": True, "groups": [optserve.Group(["w"], {}, weight_decay=0.5)]}, "weight_decay"),
        ({"hosted": True, "consistency": optserve.Async()}, "consistency"),
        ({"hosted": True}, "parameters"),
    ],
)
def test_a_setting_that_a_state_dict_cannot_hold_is_refused_by_name(client, name, options, name_of_it):
    state = client.create_optimizer(name, optserve.Adadelta(), gradients(0), **options).export_state()
    with pytest.raises(optserve.InvalidArgumentError, match=re.escape(f'state.without("{name_of_it}")')):
        optserve.torch.to_state_dict(state)
    others = {"schedule", "clipping", "weight_decay", "consistency", "parameters"} - {name_of_it}
    with pytest.raises(optserve.InvalidArgumentError, match=re.escape(f'state.without("{name_of_it}")')):
        optserve.torch.to_state_dict(state.without(*others))
    optserve.torch.to_state_dict(state.without(name_of_it, "parameters", "groups"))


def test_a_constant_schedule_is_none(client, name):
    opt = client.create_optimizer(name, optserve.Adadelta(), gradients(0), schedule=optserve.Constant())
    optserve.torch.to_state_dict(opt.export_state())


def test_adagrads_initial_accumulator_is_in_the_sum(client, name):
    params = {key: torch.nn.Parameter(torch.ones(shape)) for key, shape in PARAMETERS.items()}
    optimizer = torch.optim.Adagrad(list(params.values()), initial_accumulator_value=0.5)
    state = optserve.torch.from_state_dict(optimizer.state_dict(), params)
    assert (state.slots["w"]["sum"] == 0.5).all()
    opt = client.create_optimizer_from_state(name, state)
    before = {key: param.detach().clone() for key, param in params.items()}
    for key, param in params.items():
        param.grad = torch.from_numpy(gradients(3)[key])
    optimizer.step()
    for key, update in opt.step(gradients(3)).items():
        np.testing.assert_allclose(update, (params[key] - before[key]).detach().numpy(), rtol=1e-5, atol=1e-7)
    # Also of a parameter that torch has no state of.
    saved = optimizer.state_dict()
    del saved["state"][0]
    assert (optserve.torch.from_state_dict(saved, params).slots["w"]["sum"] == 0.5).all()


@pytest.mark.parametrize(
    ("default", "step"),
    [(torch.bfloat16, 257), (torch.float16, 70_000), (torch.float32, 2**24 + 1), (torch.float64, 2**24 + 1)],
    ids=str,
)
def test_the_step_has_torchs_dtype_and_comes_back_exactly(default, step):
    torch.set_default_dtype(default)
    try:
        zeros = {slot: np.zeros(2, np.float32) for slot in ("square_avg", "acc_delta")}
        state = optserve.OptimizerState(step, optserve.Adadelta(), {"w": optserve.TensorSpec((2,))}, {"w": zeros})
        saved = optserve.torch.to_state_dict(state)
        param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float32))
        assert optserve.torch.from_state_dict(saved, {"w": param}).step == step
        optimizer = torch.optim.Adadelta([param])
        optimizer.load_state_dict(saved)
        loaded = optimizer.state[param]["step"].dtype
        param.grad = torch.ones(2, dtype=torch.float32)
        fresh = torch.optim.Adadelta([param])
        fresh.step()
        assert saved["state"][0]["step"].dtype == loaded == fresh.state[param]["step"].dtype
        optimizer.step()
        counted = optserve.torch.from_state_dict(optimizer.state_dict(), {"w": param}).step
        # float32 cannot count beyond 2^24, so torch does not.
        assert counted == step + (default is not torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("state_dict", "params", "message"),
    [
        ({}, {}, "not a state_dict of a torch optimizer"),
        (None, {}, "not a state_dict of a torch optimizer"),
        (
            {"state": {}, "param_groups": [{"params": [0], "rho": 0.5}]},
            {"w": torch.ones(1)},
            "does not belong to Adadelta",
        ),
        ({"state": {}, "param_groups": []}, [torch.ones(1)], r"such as dict\(model\.named_parameters\(\)\)"),
        (
            {
                "state": {},
                "param_groups": [
                    torch.optim.Adadelta([torch.ones(1)]).state_dict()["param_groups"][0],
                    torch.optim.Adagrad([torch.ones(1)]).state_dict()["param_groups"][0],
                ],
            },
            {"w": torch.ones(1), "b": torch.ones(1)},
            "of different methods",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(state_dict, params, message):
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        optserve.torch.from_state_dict(state_dict, params)
