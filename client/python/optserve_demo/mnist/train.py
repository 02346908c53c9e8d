"""The training loop: it sends gradients of batches to the server, adds the updates to the parameters, and reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from optserve.errors import InvalidArgumentError
from optserve.optimizer import Optimizer
from optserve.weight_decay import with_weight_decay
from optserve_demo.mnist.data import Dataset
from optserve_demo.mnist.network import HIDDEN, Network

BATCH = 100
"""Images per step, as in the paper."""


@dataclass(frozen=True)
class Plateau:
    """Annealing by what is seen: a smaller learning rate once the error on held-out images falls no more (section 2.1).

    Attributes:
        factor: What the learning rate is multiplied by, in (0, 1).
        patience_epochs: Epochs without a new lowest error after which that is done.
        held_out: Training images that are not trained on, but looked at after each epoch.
    """

    factor: float = 0.5
    patience_epochs: int = 2
    held_out: int = 5000

    def __post_init__(self) -> None:
        """Raise InvalidArgumentError for impossible values."""
        if not 0 < self.factor < 1:
            raise InvalidArgumentError(f"factor must lie in (0, 1); it is {self.factor!r}.")
        for name in ("patience_epochs", "held_out"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, not {getattr(self, name)!r}.")


class _Annealing:
    """A plateau that is looked for in one run."""

    def __init__(
        self, plateau: Plateau, optimizer: Optimizer, report: Report, images: np.ndarray, labels: np.ndarray
    ) -> None:
        if not hasattr(optimizer.algorithm, "learning_rate"):
            raise InvalidArgumentError(f"{optimizer.algorithm.name} has no learning rate that could be annealed.")
        self._plateau, self._optimizer, self._report = plateau, optimizer, report
        self._images, self._labels = images, labels
        self._lowest, self._since = float("inf"), 0

    def look(self, epoch: int, network: Network) -> None:
        """Compute the held-out error after an epoch, and lower the learning rate if the error has not fallen."""
        error = network.error(self._images, self._labels)
        self._since = 0 if error < self._lowest else self._since + 1
        self._lowest = min(self._lowest, error)
        if self._since < self._plateau.patience_epochs:
            return
        self._since = 0
        algorithm: Any = self._optimizer.algorithm
        rate = self._plateau.factor * algorithm.learning_rate
        self._optimizer.update(replace(algorithm, learning_rate=rate))
        self._report.settings.setdefault("annealed", []).append({"after_epoch": epoch, "learning_rate": rate})


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
        """Write the report as JSON."""
        content = asdict(self) | {"test_error": self.test_error}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def new_network(dataset: Dataset, activation: str, seed: int, *, small: bool = False) -> Network:
    """The paper's network for the images and classes of a data set; see Network for `small`."""
    sizes = (dataset.train_images.shape[1], *HIDDEN, dataset.classes)
    return Network(sizes, activation, np.random.default_rng([seed, 0]), small=small)


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and for how long.

    Attributes:
        network: Changed in place.
        dataset: To train and test on.
        report: Filled as the run goes on.
        epochs: Passes over the training images.
        seed: Of the order of the images, and of what else is drawn.
    """

    network: Network
    dataset: Dataset
    report: Report
    epochs: int
    seed: int = 0


def train(
    task: Task,
    optimizer: Optimizer,
    on_progress: Callable[[Progress], None],
    *,
    weight_decay: float = 0.0,
    curvature_of: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda batch: batch,
    plateau: Plateau | None = None,
) -> None:
    """Train for some epochs, each in an order of its own that depends on the seed alone.

    Args:
        task: What is trained.
        optimizer: Of the network's parameters.
        on_progress: Called after every step.
        weight_decay: Of the weight matrices; biases keep out of it.
        curvature_of: Makes what is sent as curvature of that of the batch, for the methods that take one.
        plateau: How the learning rate is annealed; None for not at all.

    Raises:
        InvalidArgumentError: There is nothing to anneal, or no image left to train on.
        OptserveError: As for `Optimizer.step`.
    """
    network, dataset, report = task.network, task.dataset, task.report
    images, labels = dataset.train_images, dataset.train_labels
    annealing = None
    if plateau is not None:
        trained, held_out = _hold_out(plateau.held_out, len(labels), task.seed)
        annealing = _Annealing(plateau, optimizer, report, images[held_out], labels[held_out])
        images, labels = images[trained], labels[trained]
    decay = {name: weight_decay for name, param in network.params.items() if param.ndim > 1}
    loop = _Loop(network, optimizer, decay, curvature_of)
    rng = np.random.default_rng([task.seed, 1])
    batches = -(-len(labels) // BATCH)
    report.initial_test_error = test_error = network.error(dataset.test_images, dataset.test_labels)
    start = time.perf_counter()
    for epoch in range(1, task.epochs + 1):
        order = rng.permutation(len(labels))
        total = 0.0
        for batch in range(batches):
            chosen = order[batch * BATCH : (batch + 1) * BATCH]
            total += loop.step(images[chosen], labels[chosen])
            report.steps += 1
            elapsed = time.perf_counter() - start
            on_progress(
                Progress(
                    epoch=epoch,
                    epochs=task.epochs,
                    step=report.steps,
                    steps=task.epochs * batches,
                    loss=total / (batch + 1),
                    test_error=test_error,
                    steps_per_s=report.steps / elapsed,
                )
            )
        test_error = network.error(dataset.test_images, dataset.test_labels)
        report.seconds = time.perf_counter() - start
        report.epochs.append(Epoch(epoch, total / batches, test_error, report.seconds, report.steps))
        if annealing is not None:
            annealing.look(epoch, network)


def _hold_out(count: int, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images, and of the held-out images."""
    if count >= images:
        raise InvalidArgumentError(f"Of {images} training images {count} cannot be held out.")
    held_out, trained = np.split(np.random.default_rng([seed, 4]).permutation(images), [count])
    return trained, held_out


class _Loop:
    """One step after another.

    Args:
        network: Changed in place.
        optimizer: Of its parameters.
        decay: The weight decay of each matrix.
        curvature_of: See `train`.
    """

    def __init__(
        self,
        network: Network,
        optimizer: Optimizer,
        decay: dict[str, float],
        curvature_of: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    ) -> None:
        self._network, self._optimizer, self._decay, self._curvature_of = network, optimizer, decay, curvature_of
        self._updates = {name: np.empty_like(param) for name, param in network.params.items()}

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Train on one batch; returns the loss."""
        network, takes_curvature = self._network, self._optimizer.takes_curvature
        loss = network.loss_and_gradients(images, labels, with_curvature=takes_curvature)
        grads, curvature = with_weight_decay(network.grads, network.params, self._decay), None
        if takes_curvature:
            curvature = self._curvature_of(network.curvature)
            for name, rate in self._decay.items():
                curvature[name] += rate
        self._optimizer.step(grads, curvature=curvature, out=self._updates)
        for name, update in self._updates.items():
            network.params[name] += update
        return loss
