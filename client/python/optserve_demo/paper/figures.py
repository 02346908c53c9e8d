"""Draws the paper's figures, on the axes of the paper so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from optserve_demo.paper.plan import UNSCALED, Experiment
from optserve_demo.paper.training import WATCHED, Result

_NAMES = {
    "sgd": "SGD",
    "momentum": "MOMENTUM",
    "momentum-1e-2": "MOMENTUM, η = 0.01",
    "momentum-1e-3": "MOMENTUM, η = 0.001",
    "adagrad": "ADAGRAD",
    "adadelta": "ADADELTA",
    "adadelta-annealed": "ADADELTA, annealed",
    "vsgd": "vSGD",
    "vsgd-eps1e-4": "vSGD, ε = 1e-4",
    "vsgd-eps1e-6": "vSGD, ε = 1e-6",
    "vsgd-eps1e-9": "vSGD, ε = 1e-9",
    "diagonal-hessian": "diagonal Hessian, running mean of |h|",
    "diagonal-hessian-zero": "h = 0",
    "diagonal-hessian-shuffled-within": "the mean, shuffled within each tensor",
    "diagonal-hessian-shuffled": "the mean, shuffled over all of them",
}


def draw(experiment: Experiment, results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw the figures of an experiment as PNG and SVG; returns the files."""
    if any(result.looks for result in results):
        figure = _rates_and_updates(results[0])
    elif any(result.staleness for result in results):
        figure = _replicas(results)
    elif max(len(result.test_errors) for result in results) > 1:
        figure = _errors(results)
    else:
        return []
    figure.suptitle(experiment.title)
    paths = [folder / f"{experiment.name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _errors(results: Sequence[Result]) -> Any:
    """Test error against epoch, the median over the seeds; Figure 1 goes from 1 to 6 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(result.label for result in results):
        curves = [result.test_errors for result in results if result.label == label]
        errors = [median(at_epoch) for at_epoch in zip(*curves, strict=False)]
        axes.plot(range(1, len(errors) + 1), errors, label=_NAMES.get(label, label))
    axes.set(xlabel="epoch", ylabel="test error, %", ylim=(1, 6))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def _replicas(results: Sequence[Result]) -> Any:
    """Figures 3 and 4: accuracy against applied gradients and against time, the first seed of each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    labels = dict.fromkeys(result.label for result in results)
    methods = list(dict.fromkeys(label.removesuffix(UNSCALED) for label in labels))
    for label in labels:
        result = next(result for result in results if result.label == label)
        method, unscaled = label.removesuffix(UNSCALED), label.endswith(UNSCALED)
        name = _NAMES.get(method, method) + (", not scaled by staleness" if unscaled else "")
        accuracy = [100 - error for error in result.test_errors]
        for axes, values in ((by_steps, result.steps), (by_time, result.times)):
            # A run that diverged has been looked at once more since.
            color, style = f"C{methods.index(method)}", ":" if unscaled else "-"
            axes.plot(values, accuracy[: len(values)], color=color, ls=style, label=name)
    by_steps.set(xlabel="applied gradients", ylabel="test accuracy, %", ylim=(0, 100))
    by_time.set(xlabel="seconds")
    for axes in (by_steps, by_time):
        axes.grid(visible=True, alpha=0.3)
    by_steps.legend()
    return figure


def _rates_and_updates(result: Result) -> Any:
    """Figure 2: a row for each weight matrix; rates from 0 to 1 on the left, updates within 0.01 on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    grid = figure.subplots(len(WATCHED), 2, sharex=True)
    for row, name in zip(grid, WATCHED, strict=True):
        for axes, values, label, limits in (
            (row[0], result.rates[name], "effective rate", (0, 1.02)),
            (row[1], result.updates[name], "Δx", (-0.01, 0.01)),
        ):
            axes.plot(result.looks, values, lw=0.7)
            axes.set(ylim=limits, ylabel=f"{name}: {label}")
            axes.grid(visible=True, alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("steps")
    return figure
