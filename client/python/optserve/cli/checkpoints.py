"""optserve checkpoints: named copies of an optimizer's state on its server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.text import Text

from optserve.cli.as_json import Json, print_json
from optserve.cli.console import DEFAULT_TARGET, Target, clean, connect, console, fail, say, show_table, size

if TYPE_CHECKING:
    from optserve.client import Client
    from optserve.state import Checkpoint

app = typer.Typer(no_args_is_help=True, help="Take, list, restore and delete named copies of an optimizer's state.")

Name = Annotated[str, typer.Argument(help="The optimizer.")]
Tag = Annotated[str, typer.Argument(help="The copy's name: a-z, 0-9, '.', '_' and '-'.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command(name="list")
def list_(
    name: Annotated[Optional[str], typer.Argument(help="The optimizer; all by default, deleted ones too.")] = None,
    target: Target = DEFAULT_TARGET,
    json: Json = False,
) -> None:
    """List the checkpoints of an optimizer, oldest first, or of all optimizers."""
    with connect(target) as client:
        found = client.list_checkpoints(name)
    taken = [datetime.fromtimestamp(item.create_time, UTC) for item in found]
    if json:
        print_json(
            [
                {
                    "optimizer": item.optimizer,
                    "tag": item.tag,
                    "step": item.step,
                    "size_bytes": item.size_bytes,
                    "create_time": f"{time:%Y-%m-%dT%H:%M:%S.%f}Z",
                }
                for item, time in zip(found, taken, strict=True)
            ]
        )
        return
    rows = [
        [item.optimizer, item.tag, f"{item.step:,}", size(item.size_bytes), f"{time:%Y-%m-%d %H:%M:%S} UTC"]
        for item, time in zip(found, taken, strict=True)
    ]
    show_table(("optimizer", "tag", "step", "size", "taken"), rows, right=("step", "size"))


@app.command()
def save(
    name: Name,
    tag: Tag,
    target: Target = DEFAULT_TARGET,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a copy of that name.")] = False,
) -> None:
    """Take a checkpoint of the present state of an optimizer."""
    with connect(target) as client, console.status(Text(clean(f"saving {tag} …"))):
        saved = client.optimizer(name).save_checkpoint(tag, overwrite=overwrite)
    say(f"Saved {tag}: step {saved.step:,}, {size(saved.size_bytes)}.")


@app.command()
def restore(name: Name, tag: Tag, target: Target = DEFAULT_TARGET, yes: Yes = False) -> None:
    """Replace the state of an optimizer by a checkpoint. Other clients of it get an error at their next step."""
    with connect(target) as client:
        optimizer = client.optimizer(name)
        found = _find(client, name, tag)
        if not yes:
            question = (
                f"Replace the state of {name!r} at step {optimizer.current_step:,} by {tag!r} of step {found.step:,}?"
            )
            typer.confirm(clean(question), abort=True)
        with console.status(Text(clean(f"restoring {tag} …"))):
            optimizer.restore_checkpoint(tag)
    say(f"Restored {name} from {tag}: step {optimizer.current_step:,}.")


@app.command()
def delete(name: Name, tag: Tag, target: Target = DEFAULT_TARGET, yes: Yes = False) -> None:
    """Delete a checkpoint. Its optimizer may be deleted already."""
    with connect(target) as client:
        found = _find(client, name, tag)
        if not yes:
            question = f"Delete the checkpoint {tag!r} of {name!r} at step {found.step:,} on {target}?"
            typer.confirm(clean(question), abort=True)
        client.delete_checkpoint(name, tag)
    say(f"Deleted {tag} of {name}.")


def _find(client: Client, name: str, tag: str) -> Checkpoint:
    """The checkpoint of that tag; ends the command if it does not exist, before any question."""
    found = [item for item in client.list_checkpoints(name) if item.tag == tag]
    if not found:
        fail(f"{name!r} has no checkpoint {tag!r} on this server.")
    return found[0]
