"""optserve optimizers: look at and delete what a server keeps."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from optserve.cli.console import DEFAULT_TARGET, Target, console, failing_clearly

app = typer.Typer(no_args_is_help=True, help="List, show and delete the optimizers of a server.")


@app.command(name="list")
def list_(target: Target = DEFAULT_TARGET) -> None:
    """List all optimizers."""
    from optserve import connect

    table = Table("optimizer", "method", "step", "memory", "created")
    with failing_clearly(), connect(target) as client:
        for item in client.list_optimizers():
            table.add_row(
                item.name.removeprefix("optimizers/"),
                item.algorithm.WhichOneof("method"),
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


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
