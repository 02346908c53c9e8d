"""Prints the benchmark table and writes it as JSON. On a quiet machine, please."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import crowd, durability, kernels, service, torch_step
from benchmarks.measure import Timing
from optserve._common.machine import usable_cores

MNIST = 545_810
LARGE = 16_000_000
SMALL = 256
SIZES = (SMALL, 10_000, 100_000, MNIST, 1_000_000, 4_000_000, LARGE, 64_000_000)
STEP = "Step through a server"

console = Console()


@dataclass(frozen=True)
class Bar:
    """A ratio of two times that must not be exceeded."""

    name: str
    over: str
    at_most: float


@dataclass(frozen=True)
class Section:
    """One comparison: everything in it is relative to its peer."""

    title: str
    peer: str
    timings: dict[str, Timing]
    bars: tuple[Bar, ...] = ()
    statistic: Literal["median", "p99"] = "median"
    hidden: Mapping[str, float] = field(default_factory=dict)

    def time(self, name: str) -> float:
        """Seconds."""
        return getattr(self.timings[name], self.statistic)

    def ratio(self, bar: Bar) -> float | None:
        """The ratio that a bar is about; None where one of the two was not measured."""
        if bar.name not in self.timings or bar.over not in self.timings:
            return None
        return self.time(bar.name) / self.time(bar.over)

    def show(self, console: Console) -> None:
        """Print a table."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("what")
        table.caption, table.caption_justify = f"peer: {self.peer}", "left"
        for column in (f"{self.statistic}, ms", "± quartiles", "time / peer", "peer / time"):
            table.add_column(column, justify="right")
        peer = self.time(self.peer)
        for name, timing in self.timings.items():
            ratio = self.time(name) / peer
            spread = f"{100 * timing.spread:.0f} %"
            table.add_row(name, f"{1e3 * self.time(name):.3f}", spread, f"{ratio:.2f}", f"{1 / ratio:.2f}")
        console.print(table)
        for name, part in self.hidden.items():
            console.print(f"{name}: {100 * part:.0f} % of the remote step's time is hidden behind the backward pass")

    def results(self) -> Iterator[tuple[str, str, float, float | None]]:
        """(what, over what, at most, measured) of every bar."""
        for bar in self.bars:
            yield bar.name, bar.over, bar.at_most, self.ratio(bar)

    def as_json(self) -> dict[str, object]:
        """As it is written down."""
        rows = {
            name: {"median_s": timing.median, "p99_s": timing.p99, "spread": timing.spread}
            for name, timing in self.timings.items()
        }
        bars = [asdict(bar) | {"ratio": self.ratio(bar)} for bar in self.bars]
        return {"title": self.title, "peer": self.peer, "rows": rows, "bars": bars, "hidden": dict(self.hidden)}


@dataclass(frozen=True)
class Plan:
    """What is measured for a section. `rounds` overrides the command's."""

    title: str
    measure: Callable[[int, int], dict[str, Timing]]
    peer: str
    size: int
    bars: tuple[Bar, ...] = ()
    statistic: Literal["median", "p99"] = "median"
    rounds: int = 0
    hidden: Callable[[dict[str, Timing]], Mapping[str, float]] = lambda _timings: {}


STEP_BARS = {
    LARGE: (
        Bar(service.STREAM, service.PEER, 1.5),
        Bar(service.HALVES, service.PEER, 0.9),
        Bar(service.SHARED, service.KERNEL, 1.5),
        Bar(service.SHARED, service.TORCH, 1 / 4),
    ),
    MNIST: (Bar(service.SHARED, service.TORCH, 1 / 1.5),),
    SMALL: (Bar(service.STREAM, service.PEER, 1.5), Bar(service.COPIED, service.PEER, 1.5)),
}
ROUNDS = {SMALL: 400, 10_000: 200, 100_000: 100, MNIST: 60, 1_000_000: 30, 4_000_000: 15, 64_000_000: 5}


def plans() -> Iterator[Plan]:
    """All sections."""
    for size in (LARGE, MNIST):
        bars = (Bar("optserve numba", kernels.PEER, 1 / 6), Bar("optserve numpy", kernels.PEER, 1 / 1.5))
        title = f"Kernel, {size:,} float32 parameters"
        yield Plan(title, kernels.measure, kernels.PEER, size, bars if size == LARGE else ())
        yield Plan(
            f"AdamW in this process, {size:,} float32 parameters",
            kernels.adamw,
            kernels.FUSED,
            size,
            tuple(Bar(name, kernels.FUSED, 1.0) for name in (kernels.HOSTED, kernels.DELTA)),
            rounds=ROUNDS.get(size, 0),
        )
    for size in SIZES:
        yield Plan(
            f"{STEP}, {size:,} float32 parameters",
            service.measure,
            service.PEER,
            size,
            STEP_BARS.get(size, ()),
            rounds=ROUNDS.get(size, 0),
        )
    for peer, bar in ((service.RPC, 1 / 1.5), (service.RAY, 1 / 2.2)):
        yield Plan(
            f"Beside a {peer}, {LARGE:,} float32 parameters",
            partial(service.beside, peer),
            service.STREAM,
            LARGE,
            (Bar(service.STREAM, peer, bar),),
        )
    speech = sum(math.prod(shape) for shape in service.SPEECH_NET.values())
    yield Plan(
        f"An asynchronous worker's step, the paper's speech network, {speech:,} float32 parameters",
        service.speech,
        service.STREAM,
        speech,
        rounds=7,
    )
    yield Plan(
        f"A training step in PyTorch, the MNIST network, {MNIST:,} float32 parameters",
        torch_step.mnist,
        torch_step.local("AdamW"),
        MNIST,
        tuple(
            Bar(torch_step.overlapping(row(method)), torch_step.local(method), at_most)
            for method in torch_step.METHODS
            for row, at_most in ((torch_step.shared, 1.0), (torch_step.tcp, 1.5))
        ),
        rounds=100,
        hidden=torch_step.hidden,
    )
    yield Plan(
        f"A training step in PyTorch, a transformer, {torch_step.TRANSFORMER:,} float32 parameters",
        torch_step.transformer,
        torch_step.local("AdamW"),
        torch_step.TRANSFORMER,
        (
            Bar(torch_step.overlapping(torch_step.shared("AdamW")), torch_step.local("AdamW"), 1.0),
            Bar(torch_step.overlapping(torch_step.tcp("AdamW")), torch_step.local("AdamW"), 1.15),
        ),
        hidden=torch_step.hidden,
    )
    for size in (LARGE, MNIST):
        yield Plan(
            f"Durable step, {size:,} float32 parameters",
            durability.journal_cost,
            durability.IN_MEMORY,
            size,
            (Bar(durability.JOURNAL, durability.IN_MEMORY, 1.6),) if size == MNIST else (),
        )
    yield Plan(
        f"Slowest step of a hundred while snapshots are written, {MNIST:,} float32 parameters",
        durability.snapshot_stalls,
        durability.QUIET,
        MNIST,
        (Bar(durability.SNAPSHOTTING, durability.QUIET, 3.0),),
        "p99",
        rounds=400,
    )
    yield Plan(
        f"Recovery of 1 GiB of steps, {MNIST:,} float32 parameters",
        durability.recovery,
        durability.READ,
        MNIST,
        (Bar("recovery", durability.READ, 2.0),),
        rounds=5,
    )


def costs_per_parameter(sections: list[Section]) -> Section:
    """What a million parameters cost in steps of different sizes; must not rise with the size."""
    small, large = 1_000_000, 64_000_000
    steps = dict(zip(SIZES, (section for section in sections if section.title.startswith(STEP)), strict=True))
    timings = {
        f"{name}, {size:,}": Timing(tuple(seconds * 1e6 / size for seconds in section.timings[name].seconds))
        for name in (service.STREAM, service.HALVES, service.SHARED)
        for size, section in steps.items()
        if size >= small
    }
    bars = [
        Bar(f"{name}, {large:,}", f"{name}, {small:,}", 1.15)
        for name in (service.STREAM, service.HALVES, service.SHARED)
    ]
    return Section("A million parameters, in steps of", f"{service.STREAM}, {small:,}", timings, tuple(bars))


def show_bars(sections: Sequence[Section | crowd.Crowds]) -> bool:
    """Print every bar beside what was measured; whether all hold."""
    table = Table(title="Bars", title_justify="left", title_style="bold")
    for column in ("section", "time of", "over", "at most", "measured", ""):
        table.add_column(column, justify="right" if column in ("at most", "measured") else "left")
    good = True
    for section in sections:
        for name, over, at_most, ratio in section.results():
            holds = ratio is not None and ratio <= at_most
            good &= holds or ratio is None
            shown = "not measured" if ratio is None else f"{ratio:.2f}"
            table.add_row(section.title, name, over, f"{at_most:.2f}", shown, "" if holds else "[red]missed")
    console.print(table)
    return good


def plot(sections: list[Section], path: Path) -> None:
    """Draw the cost of a step against its size."""
    import matplotlib.pyplot as plt

    steps = [section for section in sections if section.title.startswith(STEP)]
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for name in dict.fromkeys(name for section in steps for name in section.timings):
        points = [
            (size, section.time(name)) for size, section in zip(SIZES, steps, strict=False) if name in section.timings
        ]
        ours = name.startswith("optserve")
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            lw=2 if ours else 1,
            ls="-" if ours else "--",
            label=name,
        )
    axes.set(
        xscale="log", yscale="log", xlabel="float32 parameters", ylabel="seconds per step", title="One ADADELTA step"
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    packages = {name: version(name) for name in ("optserve", "numpy", "numba", "torch", "grpcio", "protobuf")}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cores": str(usable_cores()), "processor": model, "python": platform.python_version()} | packages


def main(
    rounds: Annotated[int, typer.Option(min=4, help="Timed calls of each.")] = 15,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,
    plot_file: Annotated[Optional[Path], typer.Option("--plot", help="Draw cost against size into this file.")] = None,
) -> None:
    """Measure steps beside those of torch, other parameter servers, a raw gRPC echo and a copy, all in one run."""
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")
    sections: list[Section] = []
    for plan in plans():
        with console.status(f"{plan.title} …"):
            timings = plan.measure(plan.size, plan.rounds or rounds)
        section = Section(plan.title, plan.peer, timings, plan.bars, plan.statistic, plan.hidden(timings))
        section.show(console)
        sections.append(section)
    sections.append(costs_per_parameter(sections))
    sections[-1].show(console)
    with console.status("Many workers …"):
        crowds = [crowd.crowds(transport) for transport in ("auto", "grpc")]
    for one in crowds:
        one.show(console)
    good = show_bars([*sections, *crowds])
    if json_file:
        content = {
            "machine": machine(),
            "rounds": rounds,
            "sections": [section.as_json() for section in [*sections, *crowds]],
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"Figures: {json_file}")
    if plot_file:
        plot(sections, plot_file)
        console.print(f"Plot:    {plot_file}")
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
