"""Prints the benchmark table and writes it as JSON. On a quiet machine, please."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import durability, kernels, service
from benchmarks.measure import Timing
from optserve_server.backends.slices import usable_cores

MNIST = 545_810
LARGE = 16_000_000

console = Console()


@dataclass(frozen=True)
class Section:
    """One comparison: everything in it is relative to its peer."""

    title: str
    peer: str
    timings: dict[str, Timing]
    bars: dict[str, float]
    statistic: Literal["median", "p99"] = "median"

    def time(self, name: str) -> float:
        """Seconds."""
        return getattr(self.timings[name], self.statistic)

    def misses(self) -> list[str]:
        """What is slower than its bar allows; bars are least values of peer / time."""
        peer = self.time(self.peer)
        return [
            f"{self.title}: {name} is {peer / self.time(name):.2f} times as fast as {self.peer}; its bar is {bar:.2f}"
            for name, bar in self.bars.items()
            if peer / self.time(name) < bar
        ]

    def show(self) -> None:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("what")
        table.caption, table.caption_justify = f"peer: {self.peer}", "left"
        for column in (f"{self.statistic}, ms", "± quartiles", "time / peer", "peer / time"):
            table.add_column(column, justify="right")
        peer = self.time(self.peer)
        for name, timing in self.timings.items():
            ratio = self.time(name) / peer
            spread = f"{100 * timing.spread:.0f} %"
            table.add_row(name, f"{1e3 * self.time(name):.2f}", spread, f"{ratio:.2f}", f"{1 / ratio:.2f}")
        console.print(table)

    def as_json(self) -> dict[str, object]:
        rows = {
            name: {"median_s": timing.median, "p99_s": timing.p99, "spread": timing.spread}
            for name, timing in self.timings.items()
        }
        return {"title": self.title, "peer": self.peer, "rows": rows}


@dataclass(frozen=True)
class Plan:
    """What is measured for a section. `rounds` overrides the command's."""

    title: str
    measure: Callable[[int, int], dict[str, Timing]]
    peer: str
    size: int
    bars: dict[str, float] = field(default_factory=dict)
    statistic: Literal["median", "p99"] = "median"
    rounds: int = 0


def plans() -> Iterator[Plan]:
    """All sections, at the size of a large model and of MNIST's."""
    for size in (LARGE, MNIST):
        kernel_bars = {"optserve numba": 6.0, "optserve numpy": 1.5} if size == LARGE else {}
        yield Plan(f"Kernel, {size:,} float32 parameters", kernels.measure, kernels.PEER, size, kernel_bars)
        yield Plan(f"Step through a server, {size:,} float32 parameters", service.measure, service.PEER, size)
        yield Plan(
            f"Durable step, {size:,} float32 parameters",
            durability.journal_cost,
            durability.IN_MEMORY,
            size,
            {"with a journal": 1 / 1.6} if size == MNIST else {},
        )
    yield Plan(
        f"Slowest step of a hundred while snapshots are written, {MNIST:,} float32 parameters",
        durability.snapshot_stalls,
        durability.QUIET,
        MNIST,
        {durability.SNAPSHOTTING: 1 / 3},
        "p99",
        rounds=400,
    )
    yield Plan(
        f"Recovery of 1 GiB of steps, {MNIST:,} float32 parameters",
        durability.recovery,
        durability.READ,
        MNIST,
        {"recovery": 0.5},
        rounds=5,
    )


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    packages = {name: version(name) for name in ("optserve", "numpy", "numba", "torch", "grpcio", "protobuf")}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cores": str(usable_cores()), "processor": model, "python": platform.python_version()} | packages


def main(
    rounds: Annotated[int, typer.Option(min=4, help="Timed calls of each.")] = 15,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure ADADELTA steps beside torch, a raw gRPC echo and a copy, in memory and durable, all in one run."""
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")
    sections: list[Section] = []
    for plan in plans():
        with console.status(f"{plan.title} …"):
            timings = plan.measure(plan.size, plan.rounds or rounds)
        section = Section(plan.title, plan.peer, timings, plan.bars, plan.statistic)
        section.show()
        sections.append(section)
    if json_file:
        content = {"machine": machine(), "rounds": rounds, "sections": [section.as_json() for section in sections]}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"Figures: {json_file}")
    misses = [miss for section in sections for miss in section.misses()]
    for miss in misses:
        console.print(f"[red]{miss}[/red]", highlight=False)
    if misses:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
