"""Complex parameters, half floats, and master weights at the server."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer
from present import present
from pytorch.networks import EXACT, backward, network, same


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
