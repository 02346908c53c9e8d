"""The command `optserve serve`, which runs a server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.logging import RichHandler

from optserve_server.cli import serve_options as options
from optserve_server.domain import config_sources

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(name="serve")
def serve(  # noqa: PLR0913 - one for each option
    host: options.Host = None,
    port: options.Port = None,
    uds: options.Uds = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    tls_client_authority: options.TlsClientAuthority = None,
    data_dir: options.DataDir = None,
    durability: options.Durability = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    config: options.Config = None,
    log_level: options.LogLevel = "info",
    target_file: options.TargetFile = None,
    announce: options.Announce = False,
    exit_on_eof: options.ExitOnEof = False,
    print_config: options.PrintConfig = False,
) -> None:
    """Serve optimizers over gRPC until SIGTERM or Ctrl-C.

    Settings without an option are set by the environment, OPTSERVE_<NAME> in capitals, or by the file of --config;
    `optserve config` lists them. An option counts more than the environment, and that more than the file.
    """
    log_to_stderr(log_level)
    overrides = {
        "host": host,
        "port": port,
        "uds": uds,
        "tls_certificate": _text(tls_certificate),
        "tls_key": _text(tls_key),
        "tls_client_authority": _text(tls_client_authority),
        "data_dir": data_dir,
        "durability": durability,
        "backend": backend,
        "threads": threads,
    }
    try:
        loaded = config_sources.load(config, overrides)
        if print_config:
            _print(loaded)
            return
    except (ValueError, RuntimeError) as error:
        raise _refused(error) from error
    # Imported late, so that --help does not wait for gRPC and NumPy.
    from optserve_server.app import run
    from optserve_server.persistence.journal import JournalError

    try:
        run(loaded.config, announce=announce, exit_on_eof=exit_on_eof, target_file=target_file)
    # ValueError, not only ConfigError: calls of the system and of libraries raise it for settings that they refuse.
    except (ValueError, JournalError, RuntimeError, OSError) as error:
        logging.getLogger("optserve_server").debug("the server could not start, or had to stop", exc_info=True)
        raise _refused(error) from error


def _refused(error: Exception) -> typer.Exit:
    """Show the error, and end the command with exit code 2."""
    from optserve.cli.console import show_error

    show_error(str(error), "optserve serve")
    return typer.Exit(2)


def _print(loaded: config_sources.Loaded) -> None:
    """Show the settings; raises RuntimeError if there is no such backend, which is not known before."""
    from optserve.cli.console import show_table
    from optserve_server.cli.config import as_text
    from optserve_server.numerics import backends

    backends.check_name(loaded.config.backend)
    rows = [[name, as_text(getattr(loaded.config, name)), source] for name, source in loaded.sources.items()]
    show_table(("setting", "value", "from"), rows, folded="value")


def _text(path: Path | None) -> str | None:
    return str(path) if path else None


def log_to_stderr(level: str) -> None:
    """Write the log to standard error: with colours on a terminal, else one plain line per entry."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(_CleanFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_CleanFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    # The level applies to the server's own entries. Libraries log warnings and errors only.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("optserve_server").setLevel(level.upper())


class _CleanFormatter(logging.Formatter):
    """Writes control characters as escapes, so that no text of a client or a library controls the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """A log entry as text."""
        from optserve.cli.console import clean

        return clean(super().format(record))
