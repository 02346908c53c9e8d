"""The command line of the server, behind `optserve serve`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console
from rich.logging import RichHandler

from optserve_command.config import TARGET_FILE
from optserve_server.domain import config as settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

DEFAULTS = settings.ServerConfig()


@app.command(name="serve")
def serve(
    host: Annotated[
        Optional[str], typer.Option(help="Address to listen on; 0.0.0.0 for all.", show_default=DEFAULTS.host)
    ] = None,
    port: Annotated[
        Optional[int], typer.Option(help="TCP port; 0 takes a free one.", show_default=str(DEFAULTS.port))
    ] = None,
    uds: Annotated[Optional[str], typer.Option(help="Path of a Unix socket to listen on instead of TCP.")] = None,
    data_dir: Annotated[
        Optional[Path], typer.Option(help="Folder for what must outlive the process.", file_okay=False)
    ] = None,
    durability: Annotated[
        Optional[str],
        typer.Option(
            help="memory: state ends with the process. snapshot: it is written down every minute. journal: a step is "
            "on disk before it is acknowledged.",
            show_default="journal with --data-dir, else memory",
        ),
    ] = None,
    backend: Annotated[
        Optional[str],
        typer.Option(
            help="auto, cupy, numba or numpy. auto takes the fastest that works.", show_default=DEFAULTS.backend
        ),
    ] = None,
    threads: Annotated[
        Optional[int],
        typer.Option(help="Threads of a CPU kernel; 0 for one per core.", show_default=str(DEFAULTS.threads)),
    ] = None,
    config: Annotated[
        Optional[Path], typer.Option(help="TOML file with any of the settings; options win over it.", dir_okay=False)
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Least that is logged.")
    ] = "info",
    target_file: Annotated[
        Optional[Path],
        typer.Option(
            help="File that tells `optserve health` and the other commands what to connect to, while the server "
            "answers.",
            envvar=TARGET_FILE,
            dir_okay=False,
        ),
    ] = None,
    announce: Annotated[bool, typer.Option("--announce", help="Print `ready TARGET` once the server answers.")] = False,
    exit_on_eof: Annotated[bool, typer.Option("--exit-on-eof", help="Stop when standard input ends.")] = False,
) -> None:
    """Serve optimizers over gRPC until SIGTERM or Ctrl-C."""
    log_to_stderr(log_level)
    overrides = {
        "host": host,
        "port": port,
        "uds": uds,
        "data_dir": str(data_dir) if data_dir else None,
        "durability": durability,
        "backend": backend,
        "threads": threads,
    }
    # Imported late, so that --help does not wait for gRPC and NumPy.
    from optserve_server.app import run
    from optserve_server.persistence.journal import JournalError

    try:
        run(settings.load(config, overrides), announce=announce, exit_on_eof=exit_on_eof, target_file=target_file)
    # ValueError besides ConfigError: what the system's calls and libraries do not take.
    except (ValueError, JournalError, RuntimeError, OSError) as error:
        from optserve.cli.console import show_error

        logging.getLogger("optserve_server").debug("the server could not start, or go on", exc_info=True)
        show_error(str(error), "optserve serve")
        raise typer.Exit(2) from error


def log_to_stderr(level: str) -> None:
    """Logs go to standard error: readable on a terminal, one plain line each elsewhere."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(_CleanFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_CleanFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    # The level is ours; libraries speak up when something is wrong.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("optserve_server").setLevel(level.upper())


class _CleanFormatter(logging.Formatter):
    """Writes what would steer a terminal, in what a client or a library has said, as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as text."""
        from optserve.cli.console import clean

        return clean(super().format(record))
