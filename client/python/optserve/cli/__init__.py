"""The command `optserve`. A subcommand imports its modules when it runs, so that --help is quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command. An error of the client or of the system ends it with a sentence and exit code 1."""
    try:
        from optserve.cli.app import app
        from optserve.cli.console import show_error, words
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "platformdirs"):
            raise
        sys.exit("The command line needs a few more packages: pip install 'optserve[cli]', or 'optserve[server]'.")
    from optserve.errors import OptserveError

    # Characters that the encoding of the terminal lacks are printed as escapes.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        app()
    except (OptserveError, OSError) as error:
        show_error(words(error))
        sys.exit(1)
