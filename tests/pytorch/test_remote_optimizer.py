"""RemoteOptimizer in training loops: everything that users do with an optimizer of torch."""

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer
from present import present

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)


def backward(model: torch.nn.Module, step: int, factor: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)
    loss = (model(x) - x[:, :3].sin()).square().mean() * factor
    loss.backward()
    return loss


def same(one: torch.nn.Module, other: torch.nn.Module, **tolerance: Any) -> None:
    torch.testing.assert_close(list(one.parameters()), list(other.parameters()), **(tolerance or EXACT))


def pair(client: optserve.Client, name: str, method: Any, kind: Any, **given: Any):
    """(a model and its RemoteOptimizer, the same model and its optimizer of torch)."""
    ours, theirs = network(), network()
    return (
        (ours, RemoteOptimizer(ours.named_parameters(), client, method, name=name, **given)),
        (theirs, kind(theirs.named_parameters(), lr=method.learning_rate, **given)),
    )


def loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def test_one_changed_line_trains(server):
    model = network(dtype=torch.float32)
    first = backward(model, 0).item()
    with RemoteOptimizer(model.parameters(), server.target, optserve.Adam(0.01)) as optimizer:
        name = optimizer.remote.name
        loop(model, optimizer, range(100))
        last = backward(model, 0).item()
        assert name in repr(optimizer)
    assert last < first / 2
    with pytest.raises(optserve.ClientUseError, match="closed"):
        optimizer.step()
    with optserve.connect(server.target) as client:
        assert name not in [found.name for found in client.list_optimizers()], "it had no name, so close deletes it"


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20),
    "restarts": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 7),
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 5, 0.5),
    "milestones": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [3, 11]),
    "exponential": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
    "linear": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.1, 1.0, 10),
    "constant": lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, 0.3, 5),
    "polynomial": lambda opt: torch.optim.lr_scheduler.PolynomialLR(opt, 15),
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "multiplicative": lambda opt: torch.optim.lr_scheduler.MultiplicativeLR(opt, lambda _: 0.95),
    "one cycle, betas": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=30),
    "cyclic, betas": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.001, 0.05, 4),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.LinearLR(opt, 0.1), torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)],
        [6],
    ),
    "chained": lambda opt: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(opt), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "averaged": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.05, 5),
}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_schedulers_of_torch_set_the_rate_of_each_step(client, name, scheduler):
    runs = pair(client, name, optserve.AdamW(0.01), torch.optim.AdamW, weight_decay=0.1)
    for model, optimizer in runs:
        schedule = SCHEDULERS[scheduler](optimizer)
        for step in range(25):
            loop(model, optimizer, range(step, step + 1))
            schedule.step()
    same(runs[0][0], runs[1][0])


@pytest.mark.usefixtures("doubles")
def test_a_plateau_lowers_the_rate(client, name):
    runs = pair(client, name, optserve.SgdMomentum(0.1), torch.optim.SGD, momentum=0.9)
    for model, optimizer in runs:
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        for step in range(12):
            loop(model, optimizer, range(step, step + 1))
            schedule.step(1.0)
        assert optimizer.param_groups[0]["lr"] < 0.1
    same(runs[0][0], runs[1][0])


@pytest.mark.usefixtures("doubles")
def test_groups_have_their_own_settings_and_live_edits(client, name):
    def run(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> torch.nn.Module:
        model = network()
        weights = [p for key, p in model.named_parameters() if "weight" in key]
        biases = [p for key, p in model.named_parameters() if "bias" in key]
        optimizer = make([{"params": weights}, {"params": biases, "lr": 0.03, "weight_decay": 0.0, "maximize": True}])
        loop(model, optimizer, range(10))
        optimizer.param_groups[0]["lr"] = 0.001
        optimizer.param_groups[1]["betas"] = (0.5, 0.9)
        loop(model, optimizer, range(10, 20))
        optimizer.param_groups[1].update(eps=1e-3, maximize=False, weight_decay=0.5)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
        loop(model, optimizer, range(20, 30))
        return model

    theirs = run(lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1))
    ours = run(lambda groups: RemoteOptimizer(groups, client, optserve.Adam(0.01), name=name, weight_decay=0.1))
    same(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"amsgrad": True}, "amsgrad"),
        ({"differentiable": True}, "autograd"),
        ({"capturable": True}, "graph"),
        ({"lr": "fast"}, "number|used"),
        ({"lr": -1.0}, "learning_rate"),
        ({"betas": (0.9,)}, "cannot be used"),
        ({"betas": (1.5, 0.9)}, "beta1"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_a_live_edit_that_cannot_be_is_an_error_and_changes_nothing(client, name, settings, match):
    model = network()
    optimizer = RemoteOptimizer(model.parameters(), client, optserve.AdamW(0.01), name=name)
    loop(model, optimizer, range(2))
    before, old = copy.deepcopy(model), dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(settings)
    backward(model, 3)
    for _ in range(2):
        with pytest.raises(optserve.InvalidArgumentError, match=match):
            optimizer.step()
    same(model, before, rtol=0.0, atol=0.0)
    assert optimizer.remote.current_step == 2
    optimizer.param_groups[0].update(old)
    optimizer.step()
    assert optimizer.remote.current_step == 3


@pytest.mark.usefixtures("doubles")
def test_parameters_without_gradient_are_skipped(client, name):
    runs = pair(client, name, optserve.Adam(0.01), torch.optim.Adam)
    for model, optimizer in runs:
        optimizer.step()  # no gradient at all: nothing happens
        first = model[0].weight
        for step in range(12):
            first.requires_grad_(step % 3 != 1)
            loop(model, optimizer, range(step, step + 1))
    same(runs[0][0], runs[1][0])
    assert runs[0][1].remote.current_step == 12


@pytest.mark.usefixtures("doubles")
def test_closures_hooks_and_zero_grad_work_as_in_torch(client, name):
    runs = pair(client, name, optserve.SgdMomentum(0.05), torch.optim.SGD, momentum=0.9)
    for model, optimizer in runs:
        called: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, called=called: called.append("before"))
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("after"))

        def closure(model=model, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, 7)

        losses = [present(optimizer.step(closure)).item() for _ in range(4)]
        assert losses[-1] < losses[0]
        assert called == ["before", "after"] * 4
        optimizer.zero_grad(set_to_none=False)
        assert all(not present(p.grad).any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    same(runs[0][0], runs[1][0])


@pytest.mark.usefixtures("doubles")
def test_accumulation_and_clipping_by_torch(client, name):
    runs = pair(client, name, optserve.AdamW(0.01), torch.optim.AdamW)
    for model, optimizer in runs:
        for step in range(10):
            optimizer.zero_grad()
            for part in range(4):
                backward(model, 4 * step + part, 0.25)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    same(runs[0][0], runs[1][0])


@pytest.mark.usefixtures("doubles")
def test_the_server_clips(client, name):
    ours, theirs = network(), network()
    clipping = optserve.Clipping(global_norm=0.1)
    remote = RemoteOptimizer(ours.parameters(), client, optserve.AdamW(0.01), name=name, clipping=clipping)
    local = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    loop(ours, remote, range(10))
    norms = []
    for step in range(10):
        local.zero_grad()
        backward(theirs, step)
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).item())
        local.step()
    same(ours, theirs, rtol=1e-5, atol=1e-8)  # torch adds 1e-6 to the norm
    assert remote.remote.gradient_norm == pytest.approx(norms[-1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("method", "kind", "given"),
    [
        (optserve.Adam(0.01), torch.optim.Adam, {"weight_decay": 0.1}),
        (optserve.SgdMomentum(0.01), torch.optim.SGD, {"momentum": 0.9}),
        (optserve.Adagrad(0.1), torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
        (optserve.Adadelta(0.9), torch.optim.Adadelta, {"maximize": True}),
    ],
    ids=lambda item: getattr(item, "name", ""),
)
def test_complex_parameters_are_two_real_ones(client, name, dtype, method, kind, given):
    def run(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(1)
        z = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.complex128).to(dtype))
        optimizer = make([z])
        for _ in range(20):
            optimizer.zero_grad()
            (z * z.conj() - 2).abs().square().sum().backward()
            optimizer.step()
        return z.detach(), optimizer

    theirs, local = run(lambda params: kind(params, lr=method.learning_rate, **given))
    ours, remote = run(lambda params: RemoteOptimizer(params, client, method, name=name, **given))
    tolerance: dict[str, Any] = EXACT if dtype is torch.complex128 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours, theirs, **tolerance)
    expected, actual = local.state_dict()["state"][0], remote.state_dict()["state"][0]
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype or key == "step"
        torch.testing.assert_close(actual[key], value, check_dtype=False, **tolerance)
    remote.load_state_dict(local.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_floats_have_a_state_in_float32(client, name, dtype):
    model, exact = network(dtype=dtype), network(dtype=torch.float32)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.Adam(0.01), name=name)
    reference = torch.optim.Adam(exact.parameters(), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        for mine, other in zip(model.parameters(), exact.parameters(), strict=True):
            other.grad = present(mine.grad).float()
            other.data = mine.data.float()
        reference.step()
        optimizer.step()
        for mine, other in zip(model.parameters(), exact.parameters(), strict=True):
            assert torch.equal(mine, other.to(dtype)) or torch.allclose(mine.float(), other, rtol=8e-3)
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == torch.float32
    optimizer.load_state_dict(saved)
    after = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(after, saved["state"][0]["exp_avg"]), "no rounding on the way"
    torch.optim.Adam(model.named_parameters()).load_state_dict(saved)


METHODS: list[tuple[optserve.Algorithm, Any, dict[str, Any]]] = [
    (optserve.Adadelta(0.9, learning_rate=0.5), torch.optim.Adadelta, {"weight_decay": 0.1}),
    (optserve.Adagrad(0.05), torch.optim.Adagrad, {"initial_accumulator_value": 0.2}),
    (optserve.Adam(0.01), torch.optim.Adam, {"weight_decay": 0.1}),
    (optserve.AdamW(0.01), torch.optim.AdamW, {"weight_decay": 0.3}),
    (optserve.Nadam(0.01), torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optserve.Rmsprop(0.01), torch.optim.RMSprop, {"momentum": 0.5}),
    (optserve.CenteredRmsprop(0.01), torch.optim.RMSprop, {"centered": True}),
    (optserve.WindowedRms(0.01, 0.99, 0.0, 1e-8), torch.optim.RMSprop, {}),
    (optserve.SgdMomentum(0.05), torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (optserve.Momentum(0.05), torch.optim.SGD, {"momentum": 0.9}),
    (optserve.Sgd(0.05), torch.optim.SGD, {}),
]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("method", "kind", "given"), METHODS, ids=lambda item: getattr(item, "name", ""))
def test_a_run_leaves_for_torch_and_comes_back(client, name, method, kind, given):
    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        names = dict(model.named_parameters())
        return [
            {"params": [(key, p) for key, p in names.items() if "weight" in key]},
            {"params": [(key, p) for key, p in names.items() if "bias" in key], "lr": 0.02},
        ]

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        loop(model, optimizer, steps)
        optimizer.param_groups[0]["lr"] *= 0.9 if type(method) is not optserve.Momentum else 1.0

    whole, moving = network(), network()
    stayed = kind(groups(whole), lr=method.learning_rate, **given)
    first = RemoteOptimizer(groups(moving), client, method, name=f"{name}-first", **given)
    train(whole, stayed, range(10))
    train(moving, first, range(10))
    away = kind(groups(moving), lr=1.0)
    away.load_state_dict(first.state_dict())
    train(whole, stayed, range(10, 20))
    train(moving, away, range(10, 20))
    back = RemoteOptimizer(groups(moving), client, method, name=f"{name}-back")
    back.load_state_dict(away.state_dict())
    train(whole, stayed, range(20, 30))
    train(moving, back, range(20, 30))
    same(moving, whole, rtol=1e-12, atol=1e-13)
    expected = stayed.state_dict()
    actual = back.state_dict()
    for mine, other in zip(actual["param_groups"], expected["param_groups"], strict=True):
        assert {**mine, "lr": 0} == {**other, "lr": 0}
        assert mine["lr"] == pytest.approx(other["lr"])
    assert actual["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert actual["state"][index].keys() == entry.keys()


@pytest.mark.parametrize(
    "method",
    [optserve.Lion(0.01), optserve.Yogi(), optserve.FedAdam(), optserve.WindowedRms()],
    ids=lambda item: item.name,
)
def test_methods_that_torch_does_not_have_save_and_load_too(client, name, method):
    one, other = network(), network()
    whole = RemoteOptimizer(one.named_parameters(), client, method, name=f"{name}-whole", weight_decay=0.1)
    loop(one, whole, range(20))
    first = RemoteOptimizer(other.named_parameters(), client, method, name=f"{name}-first", weight_decay=0.1)
    loop(other, first, range(10))
    saved = first.state_dict()
    second = RemoteOptimizer(other.named_parameters(), client, method, name=f"{name}-second")
    second.load_state_dict(saved)
    loop(other, second, range(10, 20))
    same(one, other, rtol=0.0, atol=0.0)
    with pytest.raises(optserve.InvalidArgumentError, match=method.name):
        RemoteOptimizer(one.named_parameters(), client, optserve.Adam(), name=f"{name}-adam").load_state_dict(saved)


def test_a_state_of_another_method_or_model_is_refused_and_nothing_changes(client, name):
    model = network(dtype=torch.float32)
    optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.AdamW(0.01), name=name)
    loop(model, optimizer, range(3))
    before = optimizer.state_dict()
    other = network(dtype=torch.float32)

    def refused(saved: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)

    refused(torch.optim.Adadelta(other.named_parameters()).state_dict(), "of Adadelta, not of AdamW")
    refused(torch.optim.AdamW(other.parameters(), amsgrad=True).state_dict(), "amsgrad")
    refused(torch.optim.AdamW(other[0].named_parameters()).state_dict(), "size")
    refused(torch.optim.AdamW([{"params": [p]} for p in other.parameters()]).state_dict(), "number of parameter groups")
    refused(torch.optim.AdamW([*other.named_parameters()][::-1]).state_dict(), "another model|order")
    spoilt = copy.deepcopy(before)
    spoilt["state"][0]["exp_avg"] = torch.zeros(2)
    refused(spoilt, "exp_avg of '0.weight'")
    spoilt = copy.deepcopy(before)
    spoilt["state"][0]["exp_avg"][0, 0] = float("nan")
    refused(spoilt, "(?i)nan|finite")
    spoilt = copy.deepcopy(before)
    spoilt["param_groups"][0]["betas"] = (0.9, 2.0)
    refused(spoilt, "beta2")
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0.0, atol=0.0)
    loop(model, optimizer, range(3, 4))


def test_hooks_of_state_dicts_are_called(client, name):
    model = network()
    optimizer = RemoteOptimizer(model.parameters(), client, optserve.Adam(), name=name)
    loop(model, optimizer, range(2))
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": 1})
    saved = optimizer.state_dict()
    assert saved["mine"] == 1

    def halve(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        group = dict(given["param_groups"][0], lr=0.5)
        return {**given, "param_groups": [group]}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("loaded"))
    optimizer.load_state_dict(saved)
    assert called == ["before", "loaded"]
    assert optimizer.remote.algorithm == optserve.Adam(0.5)


def test_grad_scaler_skips_a_step_that_is_not_finite(client, name):
    model, reference = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.AdamW(0.01), name=name)
    local = torch.optim.AdamW(reference.named_parameters(), lr=0.01)
    scales = []
    for net, opt in ((model, optimizer), (reference, local)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        for step in range(10):
            opt.zero_grad()
            loss = (net(torch.full((4, 6), 0.1 * step)) - 1).square().mean()
            scaler.scale(loss).backward()
            if step == 5:
                present(next(net.parameters()).grad)[0, 0] = float("inf")
            if step % 2:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert optimizer.remote.current_step == 9
    same(model, reference, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_is_refused_without_a_scaler(client, name):
    model = network()
    optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.Adam(), name=name)
    backward(model, 0)
    present(next(model.parameters()).grad)[0, 0] = float("nan")
    before = copy.deepcopy(model)
    with pytest.raises(optserve.InvalidArgumentError, match=r"0\.weight"):
        optimizer.step()
    same(model, before, rtol=0.0, atol=0.0)
    loop(model, optimizer, range(1))


@pytest.mark.usefixtures("doubles")
def test_tied_parameters_count_once(client, name):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encode, self.decode = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            self.decode.weight = self.encode.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(self.encode(x).tanh())[:, :3]

    ours, theirs = Tied(), Tied()
    loop(ours, RemoteOptimizer(ours.named_parameters(), client, optserve.Adam(0.01), name=name), range(10))
    loop(theirs, torch.optim.Adam(theirs.parameters(), lr=0.01), range(10))
    same(ours, theirs)


def test_gradients_that_cannot_be_sent_are_one_clear_sentence(client, name):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = RemoteOptimizer(embedding.named_parameters(), client, optserve.Adam(), name=name)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(optserve.InvalidArgumentError, match="'weight' is sparse"):
        optimizer.step()
    assert optimizer.remote.current_step == 0
    meta = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(optserve.InvalidArgumentError, match="meta device"):
        RemoteOptimizer(meta.parameters(), client, optserve.Adam())
    whole = [torch.zeros(3, dtype=torch.int64)]
    with pytest.raises(optserve.InvalidArgumentError, match="int64"):
        RemoteOptimizer(whole, client, optserve.Adam())
    with pytest.raises(optserve.InvalidArgumentError, match="diagonal of the Hessian"):
        RemoteOptimizer(network().parameters(), client, optserve.Vsgd())
    with pytest.raises(optserve.InvalidArgumentError, match="learning_rate"):
        RemoteOptimizer([{"params": network().parameters(), "learning_rate": 1.0}], client, optserve.Adam())
    with pytest.raises(optserve.InvalidArgumentError, match="no setting 'momentum'"):
        RemoteOptimizer(network().parameters(), client, optserve.Adam(), momentum=0.9)
    with pytest.raises(optserve.InvalidArgumentError, match="SgdMomentum"):
        RemoteOptimizer(network().parameters(), client, optserve.Sgd(), momentum=0.9)
    with pytest.raises(optserve.InvalidArgumentError, match="algorithm must be"):
        RemoteOptimizer(network().parameters(), client, torch.optim.Adam)  # pyright: ignore[reportArgumentType]
    with pytest.raises(optserve.InvalidArgumentError, match="server must be"):
        RemoteOptimizer(network().parameters(), 5, optserve.Adam())  # pyright: ignore[reportArgumentType]


def test_it_cannot_be_copied_or_pickled(client, name):
    optimizer = RemoteOptimizer(network().parameters(), client, optserve.Adam(), name=name)
    for copying in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copying(optimizer)


def test_a_param_group_that_was_removed_is_an_error(client):
    model = network()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with RemoteOptimizer(groups, client, optserve.Adam()) as optimizer:
        removed = optimizer.param_groups.pop()
        backward(model, 0)
        for use in (optimizer.step, optimizer.state_dict):
            with pytest.raises(optserve.InvalidArgumentError, match="requires_grad"):
                use()
        optimizer.param_groups.append(removed)
        optimizer.step()


def kill(server: optserve.LocalServer) -> None:
    server.process.kill()
    server.process.wait()


def test_the_end_of_a_with_block_keeps_its_error_though_the_server_is_gone():
    began = []

    def fail() -> None:
        with RemoteOptimizer(network().parameters(), server.target, optserve.Adam()):
            kill(server)
            began.append(time.monotonic())
            raise KeyError("one's own")

    with optserve.local_server() as server:
        with pytest.warns(RuntimeWarning, match=r"'torch-\w+' may stay at the server"), pytest.raises(KeyError):
            fail()
        assert time.monotonic() - began[0] < 10


def test_a_step_of_a_server_that_has_lost_the_state_says_what_to_do():
    model = network()
    with optserve.local_server() as server:
        port = server.target.rpartition(":")[2]
        optimizer = RemoteOptimizer(model.named_parameters(), server.target, optserve.Adam(), name="lost")
        loop(model, optimizer, range(2))
        kill(server)
        with optserve.local_server(options=("--port", port)):
            with pytest.raises(optserve.StepsLostError) as caught:
                loop(model, optimizer, range(2, 3))
            assert "--data-dir" in caught.value.__notes__[0]
            optimizer.close()


def test_a_name_that_is_taken_is_an_error_or_goes_on_or_begins_anew(client, name):
    whole, model = network(), network()
    loop(whole, RemoteOptimizer(whole.named_parameters(), client, optserve.Adam(0.01), name=f"{name}-whole"), range(20))
    first = RemoteOptimizer(model.named_parameters(), client, optserve.Adam(0.01), name=name)
    loop(model, first, range(10))
    first.close()
    with pytest.raises(optserve.AlreadyExistsError, match="if_exists='resume'"):
        RemoteOptimizer(model.named_parameters(), client, optserve.Adam(0.01), name=name)
    again = RemoteOptimizer(model.named_parameters(), client, optserve.Adam(0.01), name=name, if_exists="resume")
    loop(model, again, range(10, 20))
    same(model, whole, rtol=0.0, atol=0.0)
    for params, match in (
        (network()[0].named_parameters(), "parameters of other names"),
        ([*model.named_parameters()][::-1], "another order"),
    ):
        with pytest.raises(optserve.InvalidArgumentError, match=match):
            RemoteOptimizer(params, client, optserve.Adam(), name=name, if_exists="resume")
    with pytest.raises(optserve.InvalidArgumentError, match="adam"):
        RemoteOptimizer(model.named_parameters(), client, optserve.Adagrad(), name=name, if_exists="resume")
    anew = RemoteOptimizer(model.named_parameters(), client, optserve.Adagrad(), name=name, if_exists="replace")
    assert anew.remote.current_step == 0
    found = client.optimizer(name, transport="grpc")
    same_one = RemoteOptimizer(model.named_parameters(), found)
    loop(model, same_one, range(2))
    assert found.current_step == 2


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_ways_of_transport_give_the_same_bits(client, name, transport, dtype):
    model, reference = network(dtype=dtype), network(dtype=dtype)
    optimizer = RemoteOptimizer(model.parameters(), client, optserve.AdamW(0.01), name=name, transport=transport)
    assert optimizer.remote.transport[0] == transport
    opt = client.create_optimizer(
        f"{name}-2", optserve.AdamW(0.01), {k: p.detach() for k, p in reference.named_parameters()}
    )
    for step in range(10):
        loop(model, optimizer, range(step, step + 1))
        reference.zero_grad()
        backward(reference, step)
        updates = opt.step({key: present(p.grad).numpy() for key, p in reference.named_parameters()})
        with torch.no_grad():
            for key, p in reference.named_parameters():
                torch.add(torch.from_numpy(updates[key]), p, alpha=1 - 0.01 * 0.01, out=p)
    same(model, reference, rtol=0.0, atol=0.0)


@pytest.mark.usefixtures("doubles")
def test_a_schedule_of_the_server_multiplies_the_rate_of_decoupled_decay_too(client, name):
    ours, theirs = network(), network()
    client.create_optimizer(
        name,
        optserve.AdamW(0.01),
        {key: param.detach() for key, param in ours.named_parameters()},
        schedule=optserve.Exponential(rate=0.8),
    )
    remote = RemoteOptimizer(ours.named_parameters(), client.optimizer(name), weight_decay=0.5)
    local = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(local, 0.8)
    for step in range(10):
        loop(ours, remote, range(step, step + 1))
        loop(theirs, local, range(step, step + 1))
        schedule.step()
    same(ours, theirs)


@pytest.mark.parametrize("wire", ["native", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_server_holds_master_weights_in_float32(client, name, dtype, wire):
    model = network(dtype=dtype)
    exact = network(dtype=torch.float32)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    half: Any = str(dtype).rpartition(".")[2]
    optimizer = RemoteOptimizer(
        model.named_parameters(), client, optserve.AdamW(1e-4), name=name, master_weights=True, weight_decay=0.1,
        wire_dtype="native" if wire == "native" else half,
    )  # fmt: skip
    assert optimizer.remote.transport[0] == ("shm" if wire == "native" else "grpc")
    reference = torch.optim.AdamW(exact.parameters(), lr=1e-4, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(opt, 3) for opt in (optimizer, reference)]

    def train(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            for mine, other in zip(model.parameters(), exact.parameters(), strict=True):
                other.grad = present(mine.grad).float()
            optimizer.step()
            reference.step()
            for schedule in schedules:
                schedule.step()

    train(range(10))
    held = client.optimizer(name).pull_parameters().arrays
    for key, parameter in exact.named_parameters():
        torch.testing.assert_close(torch.from_numpy(held[key]), parameter.detach(), rtol=1e-6, atol=1e-8)
        assert torch.equal(model.get_parameter(key), torch.from_numpy(held[key]).to(dtype))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(range(10, 15))
    whole = client.optimizer(name).pull_parameters().arrays

    # Once more from the checkpoint: the same bits, for it has the master weights.
    model.load_state_dict(weights)
    backward(model, 0)
    with pytest.raises(optserve.InvalidArgumentError, match="upload_parameters"):
        optimizer.step()
    optimizer.load_state_dict(saved)
    schedules[0].last_epoch = 10
    for step in range(10, 15):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        schedules[0].step()
    for key, array in client.optimizer(name).pull_parameters().arrays.items():
        np.testing.assert_array_equal(array, whole[key])
    # A checkpoint goes to torch's own class, which has no master weights.
    torch.optim.AdamW(model.named_parameters()).load_state_dict(optimizer.state_dict())

    with torch.no_grad():
        present(next(model.parameters())).mul_(0.5)
    optimizer.upload_parameters()
    optimizer.zero_grad()
    backward(model, 15)
    optimizer.step()
    optimizer.close()
    other = network(seed=9, dtype=dtype)
    again = RemoteOptimizer(
        other.named_parameters(), client, optserve.AdamW(1e-4), name=name, master_weights=True, if_exists="resume"
    )
    same(other, model, rtol=0.0, atol=0.0)
    with pytest.raises(optserve.InvalidArgumentError, match="master_weights=True"):
        RemoteOptimizer(other.named_parameters(), client, optserve.AdamW(1e-4), name=name, if_exists="resume")
    again.close()


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_parameters_that_are_added_later_train_as_in_torch(client, name, transport):
    def run(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = network()
        head, body = model[2], model[0]
        optimizer = make([*head.named_parameters(prefix="head")])
        body.requires_grad_(False)
        loop(model, optimizer, range(5))
        # Unfrozen, as in fine tuning.
        body.requires_grad_(True)
        optimizer.add_param_group({"params": [*body.named_parameters(prefix="body")], "lr": 0.002, "weight_decay": 0.0})
        loop(model, optimizer, range(5, 10))
        optimizer.param_groups[1]["lr"] = 0.02
        loop(model, optimizer, range(10, 15))
        return model, optimizer

    theirs, local = run(lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1))
    ours, remote = run(
        lambda params: RemoteOptimizer(
            params, client, optserve.AdamW(0.01), name=name, weight_decay=0.1, transport=transport
        )
    )
    same(ours, theirs)
    local.load_state_dict(remote.state_dict())
    loop(ours, remote, range(15, 20))
    with torch.no_grad():
        for mine, other in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert mine.shape == other.shape
    loop(theirs, local, range(15, 20))
    same(ours, theirs)
    for group, match in (
        ({"params": [("head.weight", torch.nn.Parameter(torch.ones(2)))]}, "twice"),
        ({"params": [("more", torch.nn.Parameter(torch.ones(2)))], "betas": (0.9, 3.0)}, "beta2"),
        ({"params": [("more", torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False))]}, "int32"),
    ):
        with pytest.raises(optserve.InvalidArgumentError, match=match):
            remote.add_param_group(group)
    assert len(remote.param_groups) == 2
    loop(ours, remote, range(20, 21))
