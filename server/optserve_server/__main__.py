"""Starts the server's command line, with its first signal handlers before all that takes time to load."""

from __future__ import annotations

from optserve_command.signals import end_at_once


def main() -> None:
    """Entry point of `optserve serve` and `python -m optserve_server`."""
    end_at_once()
    from optserve_server.cli.serve import app

    app(prog_name="optserve serve")


if __name__ == "__main__":
    main()
