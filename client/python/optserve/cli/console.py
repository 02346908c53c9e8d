"""Functions that the subcommands share: output, errors, and the option --target.

Names, paths and messages of a server are text: they are never markup, and reach the terminal without control
characters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from optserve_command.config import TLS_VARIABLES, default_target, tls_fields

if TYPE_CHECKING:
    from optserve.client import Client
    from optserve.config import ClientConfig

console = Console()
errors = Console(stderr=True)

DEFAULT_TARGET = default_target()

Target = Annotated[str, typer.Option(help="Server, HOST:PORT or unix:PATH.")]

_STEERING = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f"  # control characters; the line feed is kept
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of writing
    r"\u2028\u2029\ud800-\udfff]"  # other ends of lines; halves of characters, from file names that are no text
)
_MIN_FOLDED_WIDTH = 16
"""Least width of a folded column; if less room is left, the table is shown cell by cell."""


def client_config() -> ClientConfig:
    """The settings of a command's client for the server that its option names: with TLS if the environment says so."""
    from optserve import ClientConfig, Tls

    fields = tls_fields()
    try:
        return ClientConfig(tls=Tls(**fields) if fields else None)
    except ValueError as error:
        fail(f"{error} The environment has them as {TLS_VARIABLES['certificate']} and {TLS_VARIABLES['key']}.")


def connect(target: str) -> Client:
    """Connect a command to the server that its option names.

    Raises:
        OptserveError: See `optserve.connect`.
    """
    from optserve.client import connect

    return connect(target, client_config())


def clean(text: str, *, one_line: bool = False) -> str:
    r"""Text in which characters that control a terminal are written as escapes, such as \x1b.

    Args:
        text: From a server, a file or a user.
        one_line: Write line feeds as escapes too.
    """
    text = _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return text.replace("\n", "\\n") if one_line else text


def say(*parts: str | tuple[str, str], style: str = "", to: Console = console) -> None:
    """Print a line of parts, some of them (text, style), as they are: without markup, neither cut nor wrapped."""
    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    text = Text.assemble(*((clean(text), style) for text, style in pairs), style=style)
    to.print(text, highlight=False, soft_wrap=True)


def show_error(message: str, command: str = "optserve") -> None:
    """Show an error on standard error. Later lines are indented, so that they look like a part of the error."""
    indented = message.replace("\n", "\n  ")
    say((f"{command}:", "red"), f" {indented}", to=errors)


def fail(message: str, code: int = 1) -> NoReturn:
    """Show an error and end the command."""
    show_error(message)
    raise typer.Exit(code)


def words(error: Exception) -> str:
    """An exception as a sentence; an OSError with its file and without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename is not None else f"{error.strerror}."
    return str(error)


def check_writable(path: Path) -> None:
    """Check before the work that its result can be written to this path.

    Raises:
        OSError: It cannot be written. Nothing was changed.
    """
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    right: Collection[str] = (),
    folded: str = "",
) -> None:
    """Print a table without cutting anything.

    In a pipe the table is as wide as its cells. On a terminal that is too narrow, one column is folded; if that is not
    enough, every cell has a line of its own.

    Args:
        columns: Headers of the columns.
        rows: Cells of each row.
        title: Text above the table.
        right: Columns of numbers, which are aligned on the right.
        folded: The column that may be folded; the first by default.
    """
    rows = [[clean(cell, one_line=True) for cell in row] for row in rows]
    if title:
        say((title, "bold"))
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    folded_index = columns.index(folded) if folded else 0
    total = sum(widths) + 3 * len(columns) + 1
    width = console.width if console.is_terminal else total
    if total - max(widths[folded_index] - _MIN_FOLDED_WIDTH, 0) > width:
        _show_cells(columns, rows)
        return
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(
            Text(column),
            justify="right" if column in right else "left",
            min_width=None if index == folded_index else widths[index],
            no_wrap=index != folded_index,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    (console if console.is_terminal else Console(width=total)).print(table)


def _show_cells(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width = max(map(len, columns))
    for number, row in enumerate(rows):
        if number:
            say("")
        for column, cell in zip(columns, row, strict=True):
            say((f"{column:<{width}}", "dim"), f"  {cell}")


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
