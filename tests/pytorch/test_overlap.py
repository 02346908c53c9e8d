"""RemoteOptimizer with overlap: gradients leave while backward runs, and no step has another gradient than without."""

import gc
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import optserve
from optserve.torch import RemoteOptimizer
from present import present

TRANSPORTS = pytest.mark.parametrize("transport", ["grpc", "shm"])


def network(seed: int = 3) -> torch.nn.Sequential:
    """Weights of 3 MB and 2.6 MB, so that the first gradients leave before the last are there."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(700, 1100),
        torch.nn.Tanh(),
        torch.nn.Linear(1100, 600),
        torch.nn.Tanh(),
        torch.nn.Linear(600, 10),
    )


def backward(model: torch.nn.Module, step: int, factor: float = 1.0) -> None:
    x = torch.randn(8, 700, generator=torch.Generator().manual_seed(step))
    (model(x).square().mean() * factor).backward()


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


Loop = Callable[[torch.nn.Sequential, RemoteOptimizer], None]


def run(client: optserve.Client, loop: Loop, *, overlap: bool, transport: Any, **given: Any) -> torch.nn.Sequential:
    model = network()
    with RemoteOptimizer(
        model.named_parameters(), client, optserve.AdamW(1e-2), overlap=overlap, transport=transport, **given
    ) as optimizer:
        loop(model, optimizer)
    return model


def plain(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def accumulating(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    for step in range(4):
        optimizer.zero_grad()
        with optimizer.accumulating():
            backward(model, 2 * step)
        backward(model, 2 * step + 1)
        optimizer.step()


def kept(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    """Gradients that stay where they are, as zeros."""
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()


def closures(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    for step in range(4):

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            backward(model, step)

        optimizer.step(closure)


@pytest.mark.parametrize("loop", [plain, accumulating, kept, closures])
@TRANSPORTS
def test_a_training_with_overlap_has_the_bits_of_one_without(client, transport, loop):
    with_overlap = run(client, loop, overlap=True, transport=transport)
    assert same_bits(with_overlap, run(client, loop, overlap=False, transport=transport))


@TRANSPORTS
def test_groups_rates_and_signs_go_with_a_step_that_was_begun(client, transport):
    def loop(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            schedule.step()
            optimizer.param_groups[0]["maximize"] = step % 2 == 0

    with_overlap = run(client, loop, overlap=True, transport=transport)
    assert same_bits(with_overlap, run(client, loop, overlap=False, transport=transport))


def clipped(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scaled_in_secret(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    for param in model.parameters():
        present(param.grad).data.mul_(0.5)  # counts no version


def replaced(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    model.get_parameter("2.weight").grad = torch.ones(600, 1100)


def removed(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    model.get_parameter("4.weight").grad = None


def another_pass(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    backward(model, 77)


def another_rate(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def another_sign(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    optimizer.param_groups[0]["maximize"] = True


def saved(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    assert optimizer.state_dict()["state"]


def scaler(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
    """GradScaler changes gradients in a way that counts no version."""
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    grad_scaler.scale(torch.ones(()))
    grad_scaler.unscale_(optimizer)


CHANGES = [clipped, scaled_in_secret, replaced, removed, another_pass, another_rate, another_sign, saved, scaler]


@pytest.mark.parametrize("change", CHANGES)
@TRANSPORTS
def test_what_changes_after_backward_is_noticed_and_sent(client, transport, change):
    def loop(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            if step in (1, 2):
                change(model, optimizer)
            optimizer.step()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with_overlap = run(client, loop, overlap=True, transport=transport)
    # Where memory is shared, nothing leaves before the step.
    expected = 0 if transport == "shm" else 1
    assert ["overlap=True gains nothing" in str(one.message) for one in seen] == [True] * expected
    assert same_bits(with_overlap, run(client, loop, overlap=False, transport=transport))


@TRANSPORTS
def test_a_grad_scaler_scales_and_skips_as_without_overlap(client, transport):
    def loop(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
        grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            optimizer.zero_grad()
            x = torch.randn(8, 700, generator=torch.Generator().manual_seed(step))
            factor = float("inf") if step == 2 else 1.0
            grad_scaler.scale(model(x).square().mean() * factor).backward()
            grad_scaler.step(optimizer)
            grad_scaler.update()
        assert optimizer.remote.current_step == 4

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with_overlap = run(client, loop, overlap=True, transport=transport)
    assert ["GradScaler" in str(one.message) for one in seen] == [True] * (transport == "grpc")
    assert same_bits(with_overlap, run(client, loop, overlap=False, transport=transport))


@TRANSPORTS
def test_parameters_without_gradient_and_those_added_later_are_as_without(client, transport):
    def loop(model: torch.nn.Sequential, optimizer: RemoteOptimizer) -> None:
        for step in range(9):
            optimizer.zero_grad()
            used = model if step % 3 else model[3:]
            x = torch.randn(8, 700 if step % 3 else 600, generator=torch.Generator().manual_seed(step))
            used(x).square().mean().backward()
            optimizer.step()
            if step == 4:
                model.append(torch.nn.Linear(10, 2))
                optimizer.add_param_group({"params": [(f"5.{key}", p) for key, p in model[-1].named_parameters()]})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_overlap = run(client, loop, overlap=True, transport=transport)
    assert same_bits(with_overlap, run(client, loop, overlap=False, transport=transport))


class Failing(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_grads: torch.Tensor) -> Any:
        raise ArithmeticError("in the middle of backward")


@TRANSPORTS
def test_an_exception_in_backward_leaves_nothing_at_the_server(client, name, transport):
    model, twin = network(), network()
    loops = [(model, True), (twin, False)]
    for own, overlap in loops:
        optimizer = RemoteOptimizer(
            own.named_parameters(), client, optserve.AdamW(1e-2), name=f"{name}-{int(overlap)}", overlap=overlap,
            transport=transport,
        )  # fmt: skip
        plain(own, optimizer)
        optimizer.zero_grad()
        x = torch.randn(8, 700, generator=torch.Generator().manual_seed(50))
        with pytest.raises(ArithmeticError, match="in the middle"):
            own[2:](Failing.apply(own[:2](x))).square().mean().backward()
        optimizer.zero_grad()
        # No step is under way: another client can make one at once.
        other = client.optimizer(f"{name}-{int(overlap)}")
        assert other.current_step == 6
        other.step({key: torch.zeros_like(p).numpy() for key, p in own.named_parameters()}, timeout_s=5)
        optimizer.remote.refresh()
        plain(own, optimizer)
        optimizer.close()
    assert same_bits(model, twin)


def hooks_of(model: torch.nn.Module) -> list[Any]:
    return [hook for p in model.parameters() for hook in (p._post_accumulate_grad_hooks or {}).values()]


def test_close_removes_the_hooks_and_abandons_a_step(client, name):
    model = network()
    optimizer = RemoteOptimizer(
        model.named_parameters(), client, optserve.AdamW(1e-2), name=name, overlap=True, transport="grpc"
    )
    assert len(hooks_of(model)) == 6
    plain(model, optimizer)
    optimizer.zero_grad()
    backward(model, 9)
    assert "optserve-step" in [thread.name for thread in threading.enumerate()]
    optimizer.close()
    assert not hooks_of(model)
    assert "optserve-step" not in [thread.name for thread in threading.enumerate()]
    client.optimizer(name).step({key: present(p.grad).numpy() for key, p in model.named_parameters()}, timeout_s=5)


@TRANSPORTS
def test_a_hook_raises_nothing_into_backward(server, name, transport):
    model = network()
    client = optserve.connect(server.target)
    optimizer = RemoteOptimizer(
        model.named_parameters(), client, optserve.AdamW(1e-2), name=name, overlap=True, transport=transport
    )
    plain(model, optimizer)
    client.close()
    optimizer.zero_grad()
    backward(model, 9)
    with pytest.raises(optserve.ClientUseError, match="closed"):
        optimizer.step()
    optimizer.close()


def test_an_optimizer_that_was_forgotten_takes_nothing(client, name):
    model = network()
    optimizer = RemoteOptimizer(
        model.named_parameters(), client, optserve.AdamW(1e-2), name=name, overlap=True, transport="grpc"
    )
    plain(model, optimizer)
    known = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert known() is None
    backward(model, 1)


@TRANSPORTS
def test_a_server_that_is_killed_between_hook_and_step_changes_no_bit(tmp_path, transport, client):
    server = optserve.LocalServer.start(tmp_path)
    model = network()
    with RemoteOptimizer(
        model.named_parameters(), server.target, optserve.AdamW(1e-2), name="killed", overlap=True, transport=transport
    ) as optimizer:
        for step in range(6):
            optimizer.zero_grad()
            backward(model, step)
            if step == 3:
                os.kill(server.process.pid, signal.SIGKILL)
                server.stop()
                server = optserve.LocalServer.start(tmp_path, options=["--port", server.target.rpartition(":")[2]])
            optimizer.step()
        assert optimizer.remote.current_step == 6
    server.stop()
    assert same_bits(model, run(client, plain, overlap=False, transport=transport))
