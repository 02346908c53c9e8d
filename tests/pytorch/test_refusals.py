"""What a RemoteOptimizer refuses: each time with one clear sentence, and nothing has changed."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer
from present import present
from pytorch.networks import backward, loop, network, same


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


FOREIGN: list[tuple[optserve.Algorithm, dict[str, Any]]] = [
    (optserve.AdamW(0.01), {"momentum": 0.9}),
    (optserve.AdamW(0.01), {"rho": 0.9}),
    (optserve.SgdMomentum(0.01), {"betas": (0.9, 0.99)}),
    (optserve.Lion(0.01), {"amsgrad": False}),
    (optserve.Adam(0.01), {"initial_accumulator_value": 0.1}),
]


@pytest.mark.parametrize(("method", "foreign"), FOREIGN, ids=lambda item: getattr(item, "name", str(item)))
def test_a_setting_of_another_method_is_refused_in_a_group_too(client, name, method, foreign):
    """torch carries it along, without effect; the state_dict would be taken for one of the other method."""
    (key,) = foreign
    model = network()
    with pytest.raises(optserve.InvalidArgumentError, match=f"has no setting '{key}'; it has lr"):
        RemoteOptimizer([{"params": model.parameters(), **foreign}], client, method, name=name)
    optimizer = RemoteOptimizer(model[0].parameters(), client, method, name=name)
    with pytest.raises(optserve.InvalidArgumentError, match=f"has no setting '{key}'; it has lr"):
        optimizer.add_param_group({"params": model[2].parameters(), **foreign})
    assert len(optimizer.param_groups) == 1


def test_keys_of_users_and_schedulers_travel_with_the_groups(client, name):
    model = network()
    groups = [{"params": model.parameters(), "initial_lr": 0.01, "lr_scale": 0.5, "title": "all"}]
    optimizer = RemoteOptimizer(groups, client, optserve.AdamW(0.01), name=name)
    saved = optimizer.state_dict()
    assert (saved["param_groups"][0]["lr_scale"], saved["param_groups"][0]["title"]) == (0.5, "all")
    optimizer.load_state_dict(saved)


def test_the_state_of_a_parameter_says_where_it_is(client, name):
    model = network()
    optimizer = RemoteOptimizer(model.parameters(), client, optserve.AdamW(0.01), name=name)
    loop(model, optimizer, range(2))
    with pytest.raises(KeyError, match=r"at the server.*optimizer\.state_dict\(\)"):
        _ = optimizer.state[next(model.parameters())]["step"]
    assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.float(),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model[0].weight, "data", torch.zeros(2, 2)),
    ],
    ids=["float", "bfloat16", "shape"],
)
def test_a_model_that_is_converted_later_is_an_error(client, name, convert):
    model = network()
    optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.AdamW(0.01), name=name)
    loop(model, optimizer, range(2))
    convert(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(optserve.InvalidArgumentError, match=r"'0.weight' is torch.*make the optimizer then"):
        optimizer.step()
    assert optimizer.remote.current_step == 2


def test_a_state_goes_on_with_a_converted_model(client, name):
    model = network()
    optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.AdamW(0.01), name=name)
    loop(model, optimizer, range(2))
    saved = optimizer.state_dict()
    model.float()
    converted = RemoteOptimizer(model.named_parameters(), client, optserve.AdamW(0.01), name=f"{name}-2")
    converted.load_state_dict(saved)
    loop(model, converted, range(2, 4))
    assert converted.state_dict()["state"][0]["step"] == 4


def test_an_error_says_where_a_parameter_without_a_name_is(client, name):
    model = network()
    optimizer = RemoteOptimizer(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], client, optserve.Adam(), name=name
    )
    backward(model, 0)
    present([*model.parameters()][2].grad)[0, 0] = float("nan")
    with pytest.raises(optserve.InvalidArgumentError) as caught:
        optimizer.step()
    found = r"'2' is number 2 of all parameters of all groups, counted from 0; its shape is \[3, 5\]"
    assert re.search(found, caught.value.__notes__[0])
    mixed = [torch.zeros(3), torch.zeros(4, 2, dtype=torch.int64)]
    with pytest.raises(optserve.InvalidArgumentError) as caught:
        RemoteOptimizer(mixed, client, optserve.Adam())
    assert "number 1 of all parameters of all groups, counted from 0; its shape is [4, 2]" in caught.value.__notes__[0]
