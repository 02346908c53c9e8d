"""optserve optimizers: lists, shows, deletes, exports and imports the optimizers of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from optserve.cli.as_json import Json, plain, print_json
from optserve.cli.console import (
    DEFAULT_TARGET,
    Target,
    check_writable,
    clean,
    connect,
    errors,
    fail,
    say,
    show_table,
    size,
)

app = typer.Typer(no_args_is_help=True, help="List, show, delete, export and import the optimizers of a server.")

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command(name="list")
def list_(target: Target = DEFAULT_TARGET, json: Json = False) -> None:
    """List all optimizers."""
    with connect(target) as client:
        found = [
            {
                "name": item.name,
                "method": item.message.algorithm.WhichOneof("method"),
                "mode": "hosted" if item.hosted else "delta",
                "step": item.step,
                "memory_bytes": item.memory_bytes,
                "create_time": item.create_time.ToJsonString(),
            }
            for item in client.list_optimizers()
        ]
    if json:
        print_json(found)
        return
    rows = [
        [
            item["name"],
            item["method"],
            item["mode"],
            f"{item['step']:,}",
            size(item["memory_bytes"]),
            f"{item['create_time'][:19].replace('T', ' ')} UTC",
        ]
        for item in found
    ]
    show_table(("optimizer", "method", "mode", "step", "memory", "created"), rows, right=("step", "memory"))


@app.command()
def show(name: str, target: Target = DEFAULT_TARGET, json: Json = False) -> None:
    """Show one optimizer with its parameters."""
    from google.protobuf.text_format import MessageToString

    from optserve.optimizer_info import resource_name
    from optserve.v1 import service_pb2

    with connect(target) as client:
        request = service_pb2.GetOptimizerRequest(name=resource_name(name))
        item = client._connection.call(client._connection.stub.GetOptimizer, request).optimizer
    if json:
        print_json(plain(item))
    else:
        say(MessageToString(item, as_utf8=True))


@app.command()
def statistics(name: str, target: Target = DEFAULT_TARGET, json: Json = False) -> None:
    """Show root mean squares and effective learning rates, parameter by parameter."""
    from optserve.statistics import QUANTILES

    with connect(target) as client:
        found = client.optimizer(name).statistics()
    if json:
        parameters = [
            {
                "name": parameter,
                "rms_gradient": item.rms_gradient,
                "rms_update": item.rms_update,
                "rates": [{"quantile": quantile, "rate": rate} for quantile, rate in item.rates.items()],
            }
            for parameter, item in found.parameters.items()
        ]
        print_json({"name": name, "step": found.step, "parameters": parameters})
        return
    numbers = ("RMS[g]", "RMS[Δx]", "rate: least", "quarter", "median", "three quarters", "most")
    rows = []
    for parameter, item in found.parameters.items():
        cells = [item.rms_gradient, item.rms_update, *(item.rates.get(quantile) for quantile in QUANTILES)]
        rows.append([parameter, *("" if cell is None else f"{cell:.3g}" for cell in cells)])
    show_table(("parameter", *numbers), rows, title=f"{name} at step {found.step:,}", right=numbers)


@app.command()
def delete(name: str, target: Target = DEFAULT_TARGET, yes: Yes = False) -> None:
    """Delete an optimizer and its state."""
    with connect(target) as client:
        step = client.optimizer(name).current_step
        if not yes:
            typer.confirm(clean(f"Delete {name!r} at step {step:,}, and its state, on {target}?"), abort=True)
        client.delete_optimizer(name)
    say(f"Deleted {name}.")


@app.command(name="export")
def export(
    name: str,
    file: Annotated[Path, typer.Argument(help="The safetensors file to write.", dir_okay=False)],
    target: Target = DEFAULT_TARGET,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write the whole state of an optimizer, all of one step, to a safetensors file."""
    if file.exists() and not overwrite:
        fail(f"{file} exists; --overwrite replaces it.")
    # The state is written under this name first. Checked before the transfer, which may take long.
    check_writable(file.with_name(f"{file.name}.tmp"))
    with connect(target) as client, _transferring("exporting") as on_progress:
        state = client.optimizer(name).export_state(on_progress=on_progress)
        state.save(file)
    say(f"Exported {name}: step {state.step:,}, {size(file.stat().st_size)} in {file}.")


@app.command(name="import")
def import_(
    name: str,
    file: Annotated[Path, typer.Argument(help="A safetensors file from an export.", exists=True, dir_okay=False)],
    target: Target = DEFAULT_TARGET,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out schedule, clipping, groups, weight_decay, consistency or parameters; may be repeated."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before an optimizer's state is replaced.")] = False,
) -> None:
    """Import a state and its settings into an optimizer. If there is no optimizer of that name, create it."""
    from optserve import NotFoundError, OptimizerState

    with connect(target) as client:
        state = OptimizerState.load(file).without(*(without or ()))
        try:
            optimizer = client.optimizer(name)
        except NotFoundError:
            with _transferring("importing") as on_progress:
                client.create_optimizer_from_state(name, state, on_progress=on_progress)
        else:
            if not yes:
                typer.confirm(clean(f"Replace the state of {name!r} at step {optimizer.current_step:,}?"), abort=True)
            with _transferring("importing") as on_progress:
                optimizer.import_state(state, on_progress=on_progress)
    say(f"Imported {name}: step {state.step:,}.")


@contextmanager
def _transferring(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for the length of a with-block; gives a function that updates it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
