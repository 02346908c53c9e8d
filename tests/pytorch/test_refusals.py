"""What a RemoteOptimizer refuses: each time with one clear sentence, and nothing has changed."""

import copy
import pickle

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
