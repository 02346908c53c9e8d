"""The test error per epoch as a picture. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from optserve_demo.mnist.train import Report

PAPER_ERROR = {("adadelta", "tanh"): 0.0200, ("adadelta", "relu"): 0.0183}
"""Test errors that the paper reports after 6 epochs with ε = 1e-6 and ρ = 0.95 (section 4.1, table 2)."""


def draw(report: Report, path: Path) -> None:
    """Draw a run. The suffix of `path` chooses the format, .png or .svg for example.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    algorithm, activation = report.settings["algorithm"]["name"], report.settings["activation"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    epochs = [0, *(epoch.epoch for epoch in report.epochs)]
    errors = [100 * report.initial_test_error, *(100 * epoch.test_error for epoch in report.epochs)]
    axes.plot(epochs[1:], errors[1:], marker="o", color="tab:blue", label="optserve")
    for epoch, error in zip(epochs[1:], errors[1:], strict=True):
        axes.annotate(f"{error:.2f}", (epoch, error), (5, 5), textcoords="offset points", ha="left", fontsize=8)
    paper = PAPER_ERROR.get((algorithm, activation))
    if paper is not None:
        axes.axhline(100 * paper, color="tab:gray", linestyle="--", label=f"paper, after 6 epochs: {100 * paper:.2f} %")
    axes.set(
        xlabel="epoch",
        ylabel="test error, %",
        title=f"MNIST, {activation}, {algorithm}: {100 * report.test_error:.2f} % after {len(report.epochs)} epochs",
    )
    axes.set_ylim(0, 1.15 * max(errors[1:] or [1.0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
