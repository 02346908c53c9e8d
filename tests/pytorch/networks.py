"""Small networks, and training loops that are the same for all optimizers."""

from typing import Any

import torch

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


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
