"""Step times of this tree beside those of another revision: whether a change has made steps slower.

Both trees run with the packages of this environment, each with a client and a server of its own, and take turns in
small batches of steps, so that what disturbs the machine disturbs them alike. On a quiet machine, please.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Timing
from benchmarks.revision_steps import CASES

ROOT = Path(__file__).parents[1]
SOURCES = ("client/python", "server")
AT_MOST = 1.03
"""A step of this tree may take so much of the other's time."""

console = Console()


class Tree:
    """The steps of one revision, made in a process of its own.

    Args:
        root: Of its files.
    """

    def __init__(self, root: Path) -> None:
        paths = [*(str(root / source) for source in SOURCES), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-P", "-m", "benchmarks.revision_steps", str(root)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def steps(self, case: str, count: int) -> list[float]:
        """Seconds of each of `count` steps of a case."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipes")
        print(json.dumps([case, count]), file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the steps of {case!r} failed; see above")
        return json.loads(line)

    def close(self) -> None:
        """End the process, and the server with it."""
        self.process.communicate()


@contextmanager
def _trees(base: str) -> Iterator[tuple[Tree, Tree]]:
    """The base's and this tree's."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", base, *SOURCES], cwd=ROOT, check=True, capture_output=True
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optserve-base-")))
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        trees = Tree(folder), Tree(ROOT)
        for tree in trees:
            stack.callback(tree.close)
        yield trees


def compare(base: str, rounds: int, only: str = "") -> dict[str, tuple[Timing, Timing]]:
    """Timings of the base and of this tree, by case; of those cases that have `only` in their names."""
    timings: dict[str, tuple[Timing, Timing]] = {}
    with _trees(base) as (before, now), console.status("") as status:
        for name, case in CASES.items():
            if only not in name:
                continue
            status.update(f"{name} …")
            seconds: dict[Tree, list[float]] = {before: [], now: []}
            for turn in range(rounds + 1):
                # There and back, so that neither is always the first after a pause.
                for tree in (before, now) if turn % 2 else (now, before):
                    taken = tree.steps(name, case.batch)
                    # The first turn warms up.
                    if turn:
                        seconds[tree] += taken
            timings[name] = Timing(tuple(seconds[before])), Timing(tuple(seconds[now]))
    return timings


def main(
    base: Annotated[str, typer.Argument(help="The revision to compare with, as git names it.")],
    rounds: Annotated[int, typer.Option(min=4, help="Batches of steps of each.")] = 40,
    only: Annotated[str, typer.Option(help="Measure the steps with this in their names, as `gRPC`.")] = "",
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare the step times of this tree with those of another revision, in one run."""
    timings = compare(base, rounds, only)
    table = Table(title=f"Steps beside {base}", title_justify="left", title_style="bold")
    for column in ("step", "median, ms", "± quartiles", f"{base}, ms", "± quartiles", "time / base", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")
    good = True
    for name, (before, now) in timings.items():
        ratio = now.median / before.median
        good &= ratio <= AT_MOST
        cells = [f(timing) for timing in (now, before) for f in (_milliseconds, _spread)]
        table.add_row(name, *cells, f"{ratio:.3f}", "" if ratio <= AT_MOST else "[red]slower")
    console.print(table)
    if json_file:
        content = {name: {"base": before.seconds, "now": now.seconds} for name, (before, now) in timings.items()}
        json_file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if not good:
        raise typer.Exit(1)


def _milliseconds(timing: Timing) -> str:
    return f"{1e3 * timing.median:.3f}"


def _spread(timing: Timing) -> str:
    return f"{100 * timing.spread:.0f} %"


if __name__ == "__main__":
    typer.run(main)
