"""Checkpoints in the layout of torch: a run leaves for torch and comes back."""

import copy
from typing import Any

import pytest
import torch

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer
from pytorch.networks import loop, network, same

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
