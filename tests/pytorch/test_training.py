"""Whole training runs through RemoteOptimizer: long, interrupted, with everything that training loops do."""

import copy
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import optserve
import optserve.torch
from client.proxy import proxy
from optserve.torch import RemoteOptimizer
from present import present


class Transformer(torch.nn.Module):
    """A language model with tied embeddings."""

    def __init__(self, symbols: int = 16, width: int = 32, length: int = 8) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(symbols, width)
        self.position = torch.nn.Parameter(torch.randn(length, width) * 0.1)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 1)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, symbols, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(self.embed(tokens) + self.position, mask=self.mask, is_causal=True)
        return self.head(self.norm(hidden))

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        begins = torch.randint(0, 16, (8, 1), generator=generator)
        tokens = (begins + 3 * torch.arange(9)) % 16
        return torch.nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Mnist(torch.nn.Module):
    """The network of the paper, smaller, on images that are made up."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 50), torch.nn.Tanh(), torch.nn.Linear(50, 30), torch.nn.Tanh(), torch.nn.Linear(30, 10)
        )

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 10, (20,), generator=generator)
        # As in a real data set, an image is its class and noise.
        images = torch.nn.functional.one_hot(labels, 64) * 2.0 + torch.randn(20, 64, generator=generator)
        return torch.nn.functional.cross_entropy(self.net(images), labels)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """What a training loop does: warm-up and cosine, accumulation, loss scaling, clipping."""
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [steps // 10])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        parts = [model.loss(2 * step + part) / 2 for part in range(2)]
        for part in parts:
            scaler.scale(part).backward()
        if step % 100 == 50:
            present(next(model.parameters()).grad).view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(torch.stack(parts).sum().item())
    return losses


@pytest.fixture
def one_thread():
    """The models are too small for more, which would wait for the server's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("doubles", "one_thread")
@pytest.mark.parametrize("kind", [Transformer, Mnist], ids=lambda kind: kind.__name__)
def test_a_thousand_steps_end_where_torch_ends(client, name, kind):
    torch.manual_seed(0)
    ours = kind()
    theirs = copy.deepcopy(ours)
    # These are the lines that change.
    optimizer = RemoteOptimizer(ours.named_parameters(), client, optserve.AdamW(3e-3), name=name, weight_decay=0.1)
    losses = train(ours, optimizer, 1000)
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.1), 1000)
    assert sum(losses[-50:]) < sum(losses[:50]) / 2
    assert optimizer.remote.current_step == 990, "ten steps were not finite, and are skipped"
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-6, atol=1e-6)


@contextmanager
def killed(server: optserve.LocalServer, folder: Path) -> Iterator[list[optserve.LocalServer]]:
    """Kill a server, and start another one on its port while the block runs; the list gets it."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.stop()
    started: list[optserve.LocalServer] = []
    options = ["--port", server.target.rpartition(":")[2]]
    thread = threading.Thread(target=lambda: started.append(optserve.LocalServer.start(folder, options=options)))
    thread.start()
    yield started
    thread.join()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_server_that_is_killed_in_mid_epoch_changes_no_bit(tmp_path, transport):
    def run(folder: Path, kills: set[int]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = Mnist()
        server = optserve.LocalServer.start(folder)
        with RemoteOptimizer(
            model.named_parameters(),
            server.target,
            optserve.Adam(1e-2),
            name="mnist",
            transport=transport,
            weight_decay=0.1,
        ) as optimizer:
            assert optimizer.remote.transport[0] == transport
            for step in range(40):
                optimizer.zero_grad()
                model.loss(step).backward()
                if step in kills:
                    with killed(server, folder) as started:
                        optimizer.step()
                    server = started[0]
                else:
                    optimizer.step()
            assert optimizer.remote.current_step == 40
        server.stop()
        return [parameter.detach() for parameter in model.parameters()]

    whole = run(tmp_path / "whole", set())
    disturbed = run(tmp_path / "killed", {0, 21})
    for one, other in zip(whole, disturbed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("applied", [True, False], ids=["applied", "lost"])
def test_an_interrupted_step_is_recovered_once(server, client, name, applied):
    def make() -> Mnist:
        torch.manual_seed(1)
        return Mnist()

    def step(model: Mnist, optimizer: RemoteOptimizer, number: int) -> None:
        optimizer.zero_grad()
        model.loss(number).backward()
        optimizer.step()

    whole = make()
    undisturbed = RemoteOptimizer(whole.named_parameters(), client, optserve.Adam(1e-2), name=f"{name}-whole")
    for number in range(6):
        step(whole, undisturbed, number)
    model = make()
    with proxy(server.target) as wire, optserve.connect(wire.target) as shaky:
        optimizer = RemoteOptimizer(
            model.named_parameters(), shaky, optserve.Adam(1e-2), name=name, transport="grpc", weight_decay=0.01
        )
        optimizer.param_groups[0]["weight_decay"] = 0.0
        other = client.optimizer(name)
        assert optimizer.recover() is False
        for number in range(3):
            step(model, optimizer, number)
        assert optimizer.recover() is False, "a step that has returned is not replayed"

        interrupted = threading.Event()

        def cancel() -> None:
            while applied and other.current_step < 4:
                other.refresh()
            # It may not have begun.
            while not interrupted.wait(0.05):
                optimizer.remote.cancel()

        # No byte gets through in one direction; the call is cancelled when the server has applied the step, or not.
        wire.cut_after("down" if applied else "up", 0)
        wire.refuse = True
        watcher = threading.Thread(target=cancel)
        watcher.start()
        with pytest.raises(optserve.StepCancelledError):
            step(model, optimizer, 3)
        interrupted.set()
        watcher.join()
        wire.refuse = False
        if applied:
            with pytest.raises(optserve.StepInDoubtError) as doubt:
                optimizer.step()
            assert "recover()" in doubt.value.__notes__[0]
        assert optimizer.recover() is applied
        assert optimizer.recover() is False
        for number in range(4 if applied else 3, 6):
            step(model, optimizer, number)
        assert optimizer.remote.current_step == 6
    for one, other_one in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other_one)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_workers_of_a_data_loader_are_forked_beside_open_streams(server, name, transport):
    """gRPC's own fork handlers abort or hang some of them, and print."""
    program = """
import sys
import torch
import optserve, optserve.torch
from torch.utils.data import DataLoader, TensorDataset

target, name, transport = sys.argv[1:]
torch.set_num_threads(1)
models = [torch.nn.Linear(4, 2) for _ in range(2)]
optimizers = [
    optserve.torch.RemoteOptimizer(model.named_parameters(), target, optserve.Adam(), transport=transport)
    for model in models
]
data = TensorDataset(torch.randn(16, 4))
for epoch in range(25):
    for (x,) in DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork"):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
print([optimizer.remote.current_step for optimizer in optimizers])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, server.target, name, transport],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[100, 100]\n", ""), done.stderr
