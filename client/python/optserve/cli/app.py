"""The subcommands, put together."""

from __future__ import annotations

import typer

from optserve.cli import mnist, optimizers, server

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="An optimizer as a service: a server keeps the state of ADADELTA and its relatives, takes gradients, gives "
    "updates.",
)
# Options of `serve` are the server's own, its --help included.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(server.serve)
app.command(name="mnist")(mnist.command)
app.command()(server.health)
app.command()(server.info)
app.add_typer(optimizers.app, name="optimizers")
