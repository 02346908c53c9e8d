"""The command `optserve`. What a subcommand needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command."""
    try:
        from optserve.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "platformdirs"):
            raise
        sys.exit("The command line needs a few more packages: pip install 'optserve[cli]', or 'optserve[server]'.")
    app()
