"""RemoteOptimizer in training loops, with all that users do there: schedulers, live edits, closures, clipping."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer
from present import present
from pytorch.networks import backward, loop, network, pair, same


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


def test_a_compiled_training_step_computes_the_same_and_only_the_model_is_compiled(client, name):
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        x = torch.full((4, 6), 0.1, dtype=torch.float64)
        (model(x * step) - 1).square().mean().backward()
        optimizer.step()

    runs = pair(client, name, optserve.AdamW(0.01), torch.optim.AdamW)
    compiled = torch.compile(train, backend=count, dynamic=True)
    for step in range(1, 5):
        compiled(*runs[0], step)
        train(*runs[1], step)
    same(runs[0][0], runs[1][0])
    assert runs[0][1].remote.current_step == 4
    code = "".join(str(node.stack_trace) for graph in graphs for node in graph.graph.nodes)
    assert "def train" in code or "model(x" in code
    assert "optserve" not in code
