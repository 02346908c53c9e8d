"""The optimizer behind a RemoteOptimizer: its name, its end, its transport, parameters that are added."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import optserve
import optserve.torch
from client.proxy import proxy
from optserve.torch import RemoteOptimizer
from present import present
from pytorch.networks import backward, loop, network, same


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
            saved = torch.optim.Adam(model.named_parameters()).state_dict()
            for use in (optimizer.state_dict, lambda: optimizer.load_state_dict(saved)):
                with pytest.raises(optserve.StepsLostError) as caught:
                    use()
                assert "--data-dir" in caught.value.__notes__[0]
            optimizer.close()


def test_two_optimizers_of_one_name_are_told_of_each_other(client, name):
    model = network()
    first, second = (
        RemoteOptimizer(model.named_parameters(), client, optserve.Adam(), name=name, if_exists="resume")
        for _ in range(2)
    )
    loop(model, first, range(1))
    with pytest.raises(optserve.WrongStepError) as caught:
        loop(model, second, range(1))
    assert "under a name of its own" in caught.value.__notes__[0]


def test_groups_that_another_client_has_changed_get_no_settings_of_others(client, name):
    model = network()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    optimizer = RemoteOptimizer(groups, client, optserve.Sgd(0.5), name=name)
    loop(model, optimizer, range(2))
    other = client.optimizer(name)
    other.update(clipping=optserve.Clipping(global_norm=100.0))
    optimizer.param_groups[0]["lr"] = 0.25
    loop(model, optimizer, range(2, 3))
    own = other.groups
    other.update(groups=own[::-1])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        with pytest.raises(optserve.EtagMismatchError, match="changed the groups"):
            loop(model, optimizer, range(3, 4))
        # Also when it knows the present ones.
        optimizer.remote.refresh()
    assert all(map(torch.equal, before, model.parameters()))
    other.update(groups=own)
    optimizer.remote.refresh()
    loop(model, optimizer, range(3, 4))


def test_recover_says_that_the_server_has_lost_the_state():
    model = network()
    with optserve.local_server() as server, proxy(server.target) as wire, optserve.connect(wire.target) as client:
        port = server.target.rpartition(":")[2]
        optimizer = RemoteOptimizer(model.named_parameters(), client, optserve.Adam(), name="lost", transport="grpc")
        loop(model, optimizer, range(2))
        wire.cut_after("up", 0)
        wire.refuse = True
        canceller = threading.Timer(0.5, optimizer.remote.cancel)
        canceller.start()
        with pytest.raises(optserve.StepCancelledError):
            loop(model, optimizer, range(2, 3))
        canceller.join()
        kill(server)
        with optserve.local_server(options=("--port", port)):
            wire.refuse = False
            with pytest.raises(optserve.StepsLostError, match="has lost its state") as caught:
                optimizer.recover()
            assert "from one checkpoint, into a new RemoteOptimizer" in caught.value.__notes__[0]
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
