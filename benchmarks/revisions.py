"""Step times of this tree beside those of another revision: whether a change has made steps slower.

Both trees run with the packages of this environment, each with a client and a server of its own, and take turns in
small batches of steps, so that what disturbs the machine disturbs them alike. All are started several times, each of
the two first by turns: where the system runs the threads of a pair of processes can double the time of a small step for
as long as they live. A tree beside itself differs by up to 5 % over gRPC in four starts, in sixteen by less than 1 %.

What code costs is seen in the fastest tenth of the steps, which nothing has held up, and that is compared. Medians are
shown beside it. On a quiet machine, please.
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
def _trees(base: str, *, base_first: bool) -> Iterator[tuple[Tree, Tree]]:
    """The base's and this tree's, started in that order or in the other."""
    command = ["git", "archive", "--format=tar", base, *SOURCES]
    archive = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    if archive.returncode:
        raise typer.BadParameter(f"git has no such tree: {archive.stderr.decode(errors='replace').strip()}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optserve-base-")))
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        trees = {}
        for root in (folder, ROOT) if base_first else (ROOT, folder):
            trees[root] = Tree(root)
            stack.callback(trees[root].close)
        yield trees[folder], trees[ROOT]


def compare(base: str, rounds: int, starts: int, only: str = "") -> dict[str, tuple[Timing, Timing]]:
    """Timings of the base and of this tree, by case; of those cases that have `only` in their names."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in CASES if only in name}
    if not seconds:
        raise typer.BadParameter(f"no step has {only!r} in its name; there are: {'; '.join(CASES)}")
    with console.status("") as status:
        for start in range(1, starts + 1):
            with _trees(base, base_first=start % 2 == 1) as trees:
                for name, taken in seconds.items():
                    status.update(f"start {start} of {starts}: {name} …")
                    _take_turns(trees, name, rounds, taken)
    return {name: (Timing(tuple(before)), Timing(tuple(now))) for name, (before, now) in seconds.items()}


def _take_turns(trees: tuple[Tree, Tree], name: str, rounds: int, seconds: tuple[list[float], list[float]]) -> None:
    for turn in range(rounds + 1):
        # There and back, so that neither is always the first after a pause.
        for which in (0, 1) if turn % 2 else (1, 0):
            taken = trees[which].steps(name, CASES[name].batch)
            # The first turn warms up.
            if turn:
                seconds[which].extend(taken)


def main(
    base: Annotated[str, typer.Argument(help="The revision to compare with, as git names it.")],
    rounds: Annotated[int, typer.Option(min=4, help="Batches of steps of each, after each start.")] = 20,
    starts: Annotated[int, typer.Option(min=1, help="How often all processes are started.")] = 4,
    only: Annotated[str, typer.Option(help="Measure the steps with this in their names, as `gRPC`.")] = "",
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare the step times of this tree with those of another revision, in one run."""
    timings = compare(base, rounds, starts, only)
    table = Table(title=f"Steps beside {base}", title_justify="left", title_style="bold")
    table.add_column("step")
    for column in ("fastest tenth, ms", f"{base}, ms", "time / base", "median, ms", f"{base}, ms", "time / base"):
        table.add_column(column, justify="right")
    table.add_column("")
    good = True
    for name, (before, now) in timings.items():
        holds = now.p10 / before.p10 <= AT_MOST
        good &= holds
        pairs = (now.p10, before.p10), (now.median, before.median)
        cells = [cell for a, b in pairs for cell in (f"{1e3 * a:.3f}", f"{1e3 * b:.3f}", f"{a / b:.3f}")]
        table.add_row(name, *cells, "" if holds else "[red]slower")
    console.print(table)
    if json_file:
        content = {name: {"base": before.seconds, "now": now.seconds} for name, (before, now) in timings.items()}
        json_file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
