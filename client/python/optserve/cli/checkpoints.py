"""optserve checkpoints: named copies of an optimizer's state on its server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from optserve.cli.console import DEFAULT_TARGET, Target, console, failing_clearly
from optserve.cli.optimizers import size

app = typer.Typer(no_args_is_help=True, help="Take, list, restore and delete named copies of an optimizer's state.")

Name = Annotated[str, typer.Argument(help="The optimizer.")]
Tag = Annotated[str, typer.Argument(help="The copy's name: a-z, 0-9, '.', '_' and '-'.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command(name="list")
def list_(name: Name, target: Target = DEFAULT_TARGET) -> None:
    """List the checkpoints of an optimizer, oldest first."""
    from optserve import connect

    table = Table("tag", "step", "size", "taken")
    with failing_clearly(), connect(target) as client:
        for item in client.list_checkpoints(name):
            taken = datetime.fromtimestamp(item.create_time, UTC)
            table.add_row(item.tag, f"{item.step:,}", size(item.size_bytes), f"{taken:%Y-%m-%d %H:%M:%S} UTC")
    console.print(table)


@app.command()
def save(
    name: Name,
    tag: Tag,
    target: Target = DEFAULT_TARGET,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a copy of that name.")] = False,
) -> None:
    """Take a checkpoint of what an optimizer is now."""
    from optserve import connect

    with failing_clearly(), connect(target) as client, console.status(f"saving {tag} …"):
        saved = client.optimizer(name).save_checkpoint(tag, overwrite=overwrite)
    console.print(f"Saved {tag}: step {saved.step:,}, {size(saved.size_bytes)}.")


@app.command()
def restore(name: Name, tag: Tag, target: Target = DEFAULT_TARGET, yes: Yes = False) -> None:
    """Roll an optimizer back to a checkpoint. Clients that are stepping it are told at their next step."""
    from optserve import connect

    with failing_clearly(), connect(target) as client:
        optimizer = client.optimizer(name)
        if not yes:
            typer.confirm(f"Give up what {name!r} is at step {optimizer.current_step:,} for {tag!r}?", abort=True)
        with console.status(f"restoring {tag} …"):
            optimizer.restore_checkpoint(tag)
    console.print(f"Restored {name} from {tag}: step {optimizer.current_step:,}.")


@app.command()
def delete(name: Name, tag: Tag, target: Target = DEFAULT_TARGET, yes: Yes = False) -> None:
    """Delete a checkpoint; its optimizer need not exist any more."""
    from optserve import connect

    if not yes:
        typer.confirm(f"Delete the checkpoint {tag!r} of {name!r} on {target}?", abort=True)
    with failing_clearly(), connect(target) as client:
        client.delete_checkpoint(name, tag)
    console.print(f"Deleted {tag} of {name}.")
