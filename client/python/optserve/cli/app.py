"""Puts the subcommands together."""

from __future__ import annotations

from typing import Annotated

import typer

from optserve.cli import certs, checkpoints, mnist, optimizers, paper, server

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="An optimizer as a service: a server keeps the state of ADADELTA and its relatives, takes gradients, and "
    "returns updates.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"optserve {version('optserve')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The options of the command itself. Its help text is above."""


# The server defines the options of these commands, --help included.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=_PASSED_ON)(server.serve)
app.command(context_settings=_PASSED_ON)(server.journal)
app.command(context_settings=_PASSED_ON)(server.config)
app.command(name="mnist")(mnist.command)
app.command(name="paper")(paper.command)
app.command()(server.health)
app.command()(server.info)
app.command(name="certs")(certs.command)
app.add_typer(optimizers.app, name="optimizers")
app.add_typer(checkpoints.app, name="checkpoints")
