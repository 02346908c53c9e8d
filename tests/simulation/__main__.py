"""Play seeds of the simulation: many of them, or one with all that happens in it.

Usage: python -m tests.simulation [--seeds 100000] [--from 0] | --seed N [--trace]
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .run import play


def main() -> int:
    """Play what the command line says; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many to play")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them")
    parser.add_argument("--seed", type=int, help="play this one only")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens")
    options = parser.parse_args()
    console = Console()
    if options.seed is not None:
        try:
            play(
                options.seed,
                (lambda text: console.print(text, markup=False, highlight=False)) if options.trace else None,
            )
        # Whatever it is, it is what was looked for.
        except Exception:  # noqa: BLE001
            console.print_exception()
            return 1
        console.print(f"seed {options.seed}: all that is promised was true")
        return 0
    return _play_many(console, options.first, options.seeds)


def _play_many(console: Console, first: int, count: int) -> int:
    failed: list[int] = []
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("seeds", total=count)
        for seed in range(first, first + count):
            try:
                play(seed)
            except Exception as error:  # noqa: BLE001
                failed.append(seed)
                console.print(f"seed {seed}: {type(error).__name__}: {error}", markup=False, highlight=False)
            progress.advance(task)
    took_s = time.monotonic() - began
    console.print(
        f"{count} seeds from {first} in {took_s:.0f} s ({1000 * took_s / count:.0f} ms each), {len(failed)} failed"
    )
    for seed in failed[:20]:
        console.print(f"python -m tests.simulation --seed {seed} --trace", markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
