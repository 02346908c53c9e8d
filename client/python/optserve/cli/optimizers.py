"""optserve optimizers: look at, delete, export and import what a server keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from optserve.cli.console import DEFAULT_TARGET, Target, console, errors, fail, failing_clearly

app = typer.Typer(no_args_is_help=True, help="List, show, delete, export and import the optimizers of a server.")


@app.command(name="list")
def list_(target: Target = DEFAULT_TARGET) -> None:
    """List all optimizers."""
    from optserve import connect
    from optserve.v1 import optimizer_pb2

    table = Table("optimizer", "method", "mode", "step", "memory", "created")
    with failing_clearly(), connect(target) as client:
        for item in client.list_optimizers():
            table.add_row(
                item.name.removeprefix("optimizers/"),
                item.algorithm.WhichOneof("method"),
                "hosted" if item.mode == optimizer_pb2.MODE_HOSTED else "delta",
                f"{item.step:,}",
                size(item.memory_bytes),
                item.create_time.ToDatetime().isoformat(" ", "seconds") + " UTC",
            )
    console.print(table)


@app.command()
def show(name: str, target: Target = DEFAULT_TARGET) -> None:
    """Show one optimizer with its parameters."""
    from optserve import connect
    from optserve.v1 import service_pb2

    with failing_clearly(), connect(target) as client:
        request = service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")
        item = client._transport.call(client._transport.stub.GetOptimizer, request).optimizer
    console.print(item)


@app.command()
def statistics(name: str, target: Target = DEFAULT_TARGET) -> None:
    """Show root mean squares and effective learning rates, parameter by parameter."""
    from optserve import connect
    from optserve.statistics import QUANTILES

    with failing_clearly(), connect(target) as client:
        found = client.optimizer(name).statistics()
    table = Table(title=f"{name} at step {found.step:,}", title_justify="left", title_style="bold")
    table.add_column("parameter")
    for column in (r"RMS\[g]", r"RMS\[Δx]", "rate: least", "quarter", "median", "three quarters", "most"):
        table.add_column(column, justify="right")
    for parameter, item in found.parameters.items():
        cells = [item.rms_gradient, item.rms_update, *(item.rates.get(quantile) for quantile in QUANTILES)]
        table.add_row(parameter, *("" if cell is None else f"{cell:.3g}" for cell in cells))
    console.print(table)


@app.command()
def delete(
    name: str,
    target: Target = DEFAULT_TARGET,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an optimizer and its state."""
    from optserve import connect

    if not yes:
        typer.confirm(f"Delete {name!r} and its state on {target}?", abort=True)
    with failing_clearly(), connect(target) as client:
        client.delete_optimizer(name)
    console.print(f"Deleted {name}.")


@app.command(name="export")
def export(
    name: str,
    file: Annotated[Path, typer.Argument(help="The safetensors file to write.", dir_okay=False)],
    target: Target = DEFAULT_TARGET,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write the whole state of an optimizer, all of one step, to a safetensors file."""
    from optserve import connect

    if file.exists() and not overwrite:
        fail(f"{file} exists; --overwrite replaces it.")
    with failing_clearly(), connect(target) as client, _transferring("exporting") as on_progress:
        state = client.optimizer(name).export_state(on_progress=on_progress)
        state.save(file)
    console.print(f"Exported {name}: step {state.step:,}, {size(file.stat().st_size)} in {file}.")


@app.command(name="import")
def import_(
    name: str,
    file: Annotated[Path, typer.Argument(help="A safetensors file from an export.", exists=True, dir_okay=False)],
    target: Target = DEFAULT_TARGET,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before an optimizer's state is replaced.")] = False,
) -> None:
    """Bring a state into an optimizer, which is made if there is none of that name."""
    from optserve import NotFoundError, OptimizerState, connect

    with failing_clearly(), connect(target) as client:
        state = OptimizerState.load(file)
        try:
            optimizer = client.optimizer(name)
        except NotFoundError:
            optimizer = client.create_optimizer(name, state.algorithm, state.parameters, hosted=state.hosted)
        else:
            if not yes:
                typer.confirm(f"Replace what {name!r} is at step {optimizer.current_step:,}?", abort=True)
        with _transferring("importing") as on_progress:
            optimizer.import_state(state, on_progress=on_progress)
    console.print(f"Imported {name}: step {state.step:,}.")


@contextmanager
def _transferring(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for the length of a with-block, and what tells it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
