"""Prints the benchmark table and writes it as JSON. On a quiet machine, please."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

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

    def misses(self) -> list[str]:
        """What is slower than its bar allows; bars are least values of peer / time."""
        peer = self.timings[self.peer].median
        return [
            f"{name} is {peer / self.timings[name].median:.2f} times as fast as {self.peer}; its bar is {bar}"
            for name, bar in self.bars.items()
            if peer / self.timings[name].median < bar
        ]

    def show(self) -> None:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("what")
        table.caption, table.caption_justify = f"peer: {self.peer}", "left"
        for column in ("median, ms", "± quartiles", "time / peer", "peer / time"):
            table.add_column(column, justify="right")
        peer = self.timings[self.peer].median
        for name, timing in self.timings.items():
            ratio = timing.median / peer
            spread = f"{100 * timing.spread:.0f} %"
            table.add_row(name, f"{1e3 * timing.median:.2f}", spread, f"{ratio:.2f}", f"{1 / ratio:.2f}")
        console.print(table)

    def as_json(self) -> dict[str, object]:
        rows = {name: {"median_s": timing.median, "spread": timing.spread} for name, timing in self.timings.items()}
        return {"title": self.title, "peer": self.peer, "rows": rows}


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
    for title, module, size, bars in (
        (f"Kernel, {LARGE:,} float32 parameters", kernels, LARGE, {"optserve numba": 6.0, "optserve numpy": 1.5}),
        (f"Kernel, {MNIST:,} float32 parameters", kernels, MNIST, {}),
        (f"Step through a server, {LARGE:,} float32 parameters", service, LARGE, {}),
        (f"Step through a server, {MNIST:,} float32 parameters", service, MNIST, {}),
        (f"Durable step, {LARGE:,} float32 parameters", durability, LARGE, {}),
        (f"Durable step, {MNIST:,} float32 parameters", durability, MNIST, {"with a journal": 1 / 1.6}),
    ):
        with console.status(f"{title} …"):
            section = Section(title, module.PEER, module.measure(size, rounds), bars)
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
