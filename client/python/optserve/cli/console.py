"""What the subcommands share: the console, the option --target, and how errors are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from optserve.errors import OptserveError

console = Console()
errors = Console(stderr=True)

DEFAULT_TARGET = "127.0.0.1:50051"

Target = Annotated[str, typer.Option(help="Server, HOST:PORT or unix:PATH.")]


def fail(message: str, code: int = 1) -> NoReturn:
    """Show an error and end the command."""
    errors.print(f"[red]optserve:[/red] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def failing_clearly() -> Iterator[None]:
    """Show errors of the client as a line instead of a traceback."""
    try:
        yield
    except OptserveError as error:
        fail(str(error))
