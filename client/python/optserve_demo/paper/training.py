"""One training run of an experiment, in its own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from optserve.client import Client
from optserve.errors import InvalidArgumentError
from optserve.optimizer import Optimizer
from optserve.settings import Async
from optserve_demo.mnist.data import Dataset
from optserve_demo.mnist.replicas import Together, train_replicas
from optserve_demo.mnist.train import Progress, Report, Task, new_network, train
from optserve_demo.paper.curvature import Curvature
from optserve_demo.paper.plan import Run

WATCHED = ("w1", "w2", "w3")
ELEMENTS = 10
"""As many dimensions of each weight matrix as Figure 2 shows."""

PIXEL_STD = 0.5
"""Standard deviation of the pixels, whose mean is 0.

The paper states neither its input scaling nor its initial weights. This, and weights within 1 / √fan_in, were chosen
because plain gradient descent then behaves as in Table 1: with larger pixels or weights it diverges at a rate of 1,
where the paper's does not, and ADADELTA with ε = 1e-2, whose effective rate is near 1, does badly. Replicas, which the
paper did not run on MNIST, train as `optserve mnist` does.
"""

_DIVERGED = ("NON_FINITE_VALUE", "GRADIENT_OVERFLOW")


@dataclass
class Result:
    """What a run found.

    Attributes:
        label: The run's.
        seed: The run's.
        settings: Everything else that it was run with.
        test_errors: Per cent of the test images classified wrongly, after each epoch.
        losses: Mean cross-entropy of each epoch.
        steps: Applied by the end of each epoch.
        times: Seconds of training by then.
        staleness: Of the gradients of replicas, the mean.
        stalest: The most.
        diverged: Whether a gradient was no longer a number, which ended it.
        seconds: Of training.
        looks: Steps at which the rates were looked at.
        rates: Effective learning rates by parameter: a row for each look, a column for each element.
        updates: Updates Δx, likewise.
    """

    label: str
    seed: int
    settings: dict[str, Any]
    test_errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    staleness: float = 0.0
    stalest: int = 0
    diverged: bool = False
    seconds: float = 0.0
    looks: list[int] = field(default_factory=list)
    rates: dict[str, list[list[float]]] = field(default_factory=dict)
    updates: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """That of the run."""
        return f"{self.label}-seed{self.seed}"

    def write(self, path: Path) -> None:
        """Write the result as JSON, as a whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Result:
        """The reverse of `write`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def run(client: Client, name: str, plan: Run, dataset: Dataset, on_step: Callable[[int], None]) -> Result:
    """Train once.

    Args:
        client: Of the server that keeps the optimizer.
        name: Of the optimizer, which is deleted in the end.
        plan: What is run.
        dataset: MNIST.
        on_step: Told how many steps have been made.
    """
    together = Together(plan.replicas, Async(scale_by_staleness=plan.scale_by_staleness)) if plan.replicas else None
    if together is None:
        dataset = scaled(dataset)
    network = new_network(dataset, plan.activation, plan.seed, small=together is None)
    settings = settings_of(plan)
    report, result = Report(dict(settings)), Result(plan.label, plan.seed, settings)
    optimizer = client.create_optimizer(
        name,
        plan.algorithm,
        network.params,
        schedule=plan.schedule,
        hosted=together is not None,
        consistency=together.consistency if together else None,
    )
    watch = _Watch(optimizer, plan.seed, result) if plan.look_every else None

    def on_progress(progress: Progress) -> None:
        on_step(progress.step)
        if watch is not None and progress.step % plan.look_every == 0:
            watch.look(progress.step)

    try:
        # A diverging run overflows; that is an expected result.
        task = Task(network, dataset, report, plan.epochs, plan.seed)
        with np.errstate(all="ignore"):
            if together is None:
                curvature_of = Curvature(plan.curvature, plan.seed)
                train(task, optimizer, on_progress, curvature_of=curvature_of)
            else:
                # Each replica computes in its own thread.
                with threadpool_limits(1):
                    train_replicas(task, client, name, together, on_progress)
    except InvalidArgumentError as error:
        if error.reason not in _DIVERGED:
            raise
        result.diverged = True
        with np.errstate(all="ignore"):
            result.test_errors.append(100 * network.error(dataset.test_images, dataset.test_labels))
    finally:
        optimizer.close()
        client.delete_optimizer(name)
    result.test_errors = [100 * epoch.test_error for epoch in report.epochs] + result.test_errors
    result.losses = [epoch.loss for epoch in report.epochs]
    result.steps = [epoch.steps for epoch in report.epochs]
    result.times = [round(epoch.seconds, 2) for epoch in report.epochs]
    result.staleness, result.stalest = report.settings.get("mean_staleness", 0.0), report.settings.get("stalest", 0)
    result.seconds = report.seconds
    return result


def settings_of(plan: Run) -> dict[str, Any]:
    """What a result is the result of, as JSON has it."""
    schedule = None if plan.schedule is None else {"kind": plan.schedule.kind, **asdict(plan.schedule)}
    content = {
        "algorithm": {"name": plan.algorithm.name, **asdict(plan.algorithm)},
        "activation": plan.activation,
        "epochs": plan.epochs,
        "schedule": schedule,
        "look_every": plan.look_every,
        "pixel_std": 1.0 if plan.replicas else PIXEL_STD,
        "initial_weights": "Glorot's or He's" if plan.replicas else "uniform within 1 / sqrt(fan_in)",
    }
    if plan.replicas:
        content |= {"replicas": plan.replicas, "scale_by_staleness": plan.scale_by_staleness}
    if plan.algorithm.takes_curvature:
        content["curvature"] = plan.curvature
    return json.loads(json.dumps(content))


def scaled(dataset: Dataset) -> Dataset:
    """The data set, whose pixels have standard deviation 1, with PIXEL_STD instead."""
    scale = np.float32(PIXEL_STD)
    return replace(dataset, train_images=scale * dataset.train_images, test_images=scale * dataset.test_images)


class _Watch:
    """Looks at a few elements of each weight matrix through GetStatistics, always the same ones."""

    def __init__(self, optimizer: Optimizer, seed: int, result: Result) -> None:
        self._optimizer = optimizer
        self._seed = seed
        self._result = result
        result.rates, result.updates = ({name: [] for name in WATCHED} for _ in range(2))

    def look(self, step: int) -> None:
        found = self._optimizer.statistics(WATCHED, random_indices=ELEMENTS, seed=self._seed)
        self._result.looks.append(step)
        for name, item in found.parameters.items():
            rates, updates = item.elements.rates, item.elements.updates
            self._result.rates[name].append([] if rates is None else rates.tolist())
            self._result.updates[name].append([] if updates is None else updates.tolist())
