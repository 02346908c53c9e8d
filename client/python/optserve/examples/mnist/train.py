"""The training loop: batches in, gradients to the server, updates onto the parameters, a report at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optserve.examples.mnist.data import Dataset
from optserve.examples.mnist.network import HIDDEN, Network
from optserve.optimizer import Optimizer
from optserve.weight_decay import with_weight_decay

BATCH = 100
"""Images per step, as in the paper."""


@dataclass
class Progress:
    """Where a run is: told after every step and every epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    test_error: float
    steps_per_s: float


@dataclass
class Epoch:
    """One epoch's results.

    Attributes:
        loss: Mean cross-entropy of its batches.
        test_error: Share of the test images classified wrongly after it, in [0, 1].
        seconds: Time since the start of training, evaluation included.
        steps: Applied by then.
    """

    epoch: int
    loss: float
    test_error: float
    seconds: float
    steps: int


@dataclass
class Report:
    """What a run did, as it is written to JSON."""

    settings: dict[str, Any]
    server: dict[str, Any] = field(default_factory=dict)
    initial_test_error: float = 1.0
    epochs: list[Epoch] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    @property
    def test_error(self) -> float:
        """Share of the test images classified wrongly at the end, in [0, 1]."""
        return self.epochs[-1].test_error if self.epochs else self.initial_test_error

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        content = asdict(self) | {"test_error": self.test_error}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def new_network(dataset: Dataset, activation: str, seed: int, *, small: bool = False) -> Network:
    """The paper's network for the images and classes of a data set; see Network for `small`."""
    sizes = (dataset.train_images.shape[1], *HIDDEN, dataset.classes)
    return Network(sizes, activation, np.random.default_rng([seed, 0]), small=small)


def train(
    network: Network,
    optimizer: Optimizer,
    dataset: Dataset,
    report: Report,
    *,
    epochs: int,
    seed: int,
    on_progress: Callable[[Progress], None],
    weight_decay: float = 0.0,
) -> None:
    """Train for some epochs, each in an order of its own that depends on the seed alone.

    Args:
        network: Changed in place.
        optimizer: Of the network's parameters.
        dataset: To train and test on.
        report: Filled as the run goes on.
        epochs: How many.
        seed: Of the order of the images.
        on_progress: Called after every step.
        weight_decay: Of the weight matrices; biases keep out of it.
    """
    decay = {name: weight_decay for name, param in network.params.items() if param.ndim > 1}
    rng = np.random.default_rng([seed, 1])
    updates = {name: np.empty_like(param) for name, param in network.params.items()}
    images, labels = dataset.train_images, dataset.train_labels
    batches = -(-len(labels) // BATCH)
    report.initial_test_error = network.error(dataset.test_images, dataset.test_labels)
    test_error = report.initial_test_error
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(labels))
        total = 0.0
        for batch in range(batches):
            chosen = order[batch * BATCH : (batch + 1) * BATCH]
            total += network.loss_and_gradients(
                images[chosen], labels[chosen], with_curvature=optimizer.takes_curvature
            )
            grads, curvature = with_weight_decay(network.grads, network.params, decay), None
            if optimizer.takes_curvature:
                curvature = network.curvature
                for name, rate in decay.items():
                    curvature[name] += rate
            optimizer.step(grads, curvature=curvature, out=updates)
            for name, update in updates.items():
                network.params[name] += update
            report.steps += 1
            elapsed = time.perf_counter() - start
            on_progress(
                Progress(
                    epoch=epoch,
                    epochs=epochs,
                    step=report.steps,
                    steps=epochs * batches,
                    loss=total / (batch + 1),
                    test_error=test_error,
                    steps_per_s=report.steps / elapsed,
                )
            )
        test_error = network.error(dataset.test_images, dataset.test_labels)
        report.seconds = time.perf_counter() - start
        report.epochs.append(Epoch(epoch, total / batches, test_error, report.seconds, report.steps))
