"""Training steps of torch, forward and backward pass included: RemoteOptimizer beside torch's own optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

import optserve
from benchmarks.measure import Candidate, Timing, interleaved
from optserve.optimizer import TransportName
from optserve.torch import RemoteOptimizer

WITHOUT = "forward and backward pass alone"
METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], optserve.Algorithm]] = {
    "AdamW": (torch.optim.AdamW, optserve.AdamW(1e-3)),
    "Adadelta": (torch.optim.Adadelta, optserve.Adadelta(0.9)),
}
FASTEST: dict[str, dict[str, bool]] = {"AdamW": {"fused": True}, "Adadelta": {"foreach": True}}
"""Settings with which torch's own class takes least time; its defaults are what a remote step is compared with."""
LAYERS, WIDTH, TOKENS = 8, 512, (2, 64)
TRANSFORMER = LAYERS * (12 * WIDTH**2 + 13 * WIDTH)
"""Parameters of its layers."""


def local(method: str) -> str:
    """The name of the row of torch's own class."""
    return f"torch.optim.{method}, in process"


def fastest(method: str) -> str:
    """The name of the row of torch's own class with its fastest setting."""
    return f"torch.optim.{method}, {', '.join(FASTEST[method])}"


def shared(method: str) -> str:
    """The name of the row of a server that shares its memory."""
    return f"RemoteOptimizer, {method}, shared memory"


def tcp(method: str) -> str:
    """The name of the row of a server on this host without shared memory."""
    return f"RemoteOptimizer, {method}, TCP loopback"


def overlapping(row: str) -> str:
    """The name of the row whose gradients are sent while backward runs."""
    return f"{row}, overlap"


def hidden(timings: dict[str, Timing]) -> dict[str, float]:
    """The part of each remote step's time that overlap hides behind the backward pass, by name of the row."""
    alone = timings[WITHOUT].median
    return {
        overlapping(row): 1 - (timings[overlapping(row)].median - alone) / (timing.median - alone)
        for row, timing in timings.items()
        if overlapping(row) in timings
    }


class _NoOptimizer:
    def __init__(self, params: Iterable[torch.nn.Parameter]) -> None:
        self._params = list(params)

    def zero_grad(self) -> None:
        for param in self._params:
            param.grad = None

    def step(self) -> None:
        """Do nothing."""


def mnist(size: int, rounds: int) -> dict[str, Timing]:
    """The paper's network for MNIST, 100 images a step."""
    images, labels = torch.randn(100, 784), torch.randint(0, 10, (100,))

    def network() -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]:
        sizes = (784, 500, 300, 10)
        layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
        return net, lambda model: torch.nn.functional.cross_entropy(model(images), labels)

    return _measure(network, size, ("AdamW", "Adadelta"), rounds)


def transformer(size: int, rounds: int) -> dict[str, Timing]:
    """Layers of a transformer with 25 million parameters, 128 tokens a step."""
    tokens = torch.randn(*TOKENS, WIDTH)

    def network() -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]:
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
        net = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        return net, lambda model: (model(tokens) - tokens).square().mean()

    return _measure(network, size, ("AdamW",), rounds)


def _remote(
    client: optserve.Client,
    algorithm: optserve.Algorithm,
    transport: TransportName,
    overlap: bool,
    params: Iterable[torch.nn.Parameter],
) -> RemoteOptimizer:
    return RemoteOptimizer(params, client, algorithm, transport=transport, overlap=overlap)


def _measure(
    network: Callable[[], tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]],
    size: int,
    methods: Iterable[str],
    rounds: int,
) -> dict[str, Timing]:
    candidates: dict[str, Candidate] = {}

    def add(name: str, make: Callable[[Iterable[torch.nn.Parameter]], Any]) -> None:
        model, loss = network()
        if sum(parameter.numel() for parameter in model.parameters()) != size:
            raise RuntimeError(f"the model has not {size} parameters")
        optimizer = make(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        candidates[name] = Candidate(step)

    with ExitStack() as stack:
        server = stack.enter_context(optserve.local_server())
        client = stack.enter_context(optserve.connect(server.target))
        add(WITHOUT, _NoOptimizer)
        for method in methods:
            kind, algorithm = METHODS[method]
            add(local(method), lambda params, kind=kind: kind(params, lr=1e-3))
            best = FASTEST[method]
            add(fastest(method), lambda params, kind=kind, best=best: kind(params, lr=1e-3, **best))
            rows: dict[str, TransportName] = {shared(method): "shm", tcp(method): "grpc"}
            for name, transport in rows.items():
                for overlap in (False, True):
                    make = partial(_remote, client, algorithm, transport, overlap)
                    row = overlapping(name) if overlap else name
                    add(row, lambda params, make=make: stack.enter_context(make(params)))
        return interleaved(candidates, rounds)
