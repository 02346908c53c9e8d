"""The command `optserve certs`: an authority of one's own, and certificates for a server and its clients."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Optional

import typer

from optserve.cli.console import fail, say, show_table
from optserve_command.config import TLS_VARIABLES

_CLIENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def command(
    folder: Annotated[Path, typer.Argument(help="Folder for the files; made if it does not exist.", file_okay=False)],
    host: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Name or address by which clients reach the server; repeat it for several.",
            show_default="localhost, 127.0.0.1 and ::1",
        ),
    ] = None,
    client: Annotated[
        Optional[list[str]],
        typer.Option(help="Name of a client that gets a certificate; repeat it for several.", show_default="client"),
    ] = None,
    days: Annotated[int, typer.Option(help="Days that the certificates are valid.", min=1, max=3650)] = 365,
) -> None:
    """Make an authority, and certificates for a server and its clients, for trying out secured connections.

    An authority that is in the folder already signs the new certificates. They replace the old ones, which running
    servers and clients take over without a restart. Keys are readable by their owner alone.

    Whoever has authority-key.pem can make certificates: keep it away from servers and clients.
    """
    # Imported late, so that --help does not wait for it.
    from optserve.cli import authority

    hosts, clients = host or ["localhost", "127.0.0.1", "::1"], client or ["client"]
    for name in clients:
        if not _CLIENT.fullmatch(name) or name in ("authority", "server") or name.endswith("-key"):
            fail(
                f"{name!r} cannot be the name of a client: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a "
                "letter or digit, neither 'authority' nor 'server', and not ending in '-key'."
            )
    life = timedelta(days=days)
    try:
        # First, so that nothing is made if one of them is none.
        hosts = [authority.host_of(name) for name in hosts]
        with authority.working_in(folder):
            issuer = authority.load_or_make(folder, life)
            end = issuer.certificate.not_valid_after_utc
            rows = [["authority", "-", f"{end:%Y-%m-%d}", "authority.pem"]]
            rows += [issuer.issue("server", life, hosts)]
            rows += [issuer.issue(name, life) for name in clients]
    except authority.AuthorityError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror}.")
    show_table(("certificate", "for", "until", "file"), rows)
    if end < datetime.now(UTC) + life - timedelta(days=1):
        say(f"The authority ends before the {days} days are over, and its certificates with it.")
    files = {name: shlex.quote(str(folder / name)) for name in ("authority.pem", "server.pem", "server-key.pem")}
    pair = [shlex.quote(str(folder / f"{clients[0]}{ending}.pem")) for ending in ("", "-key")]
    say(f"A server:  optserve serve --tls-certificate {files['server.pem']} --tls-key {files['server-key.pem']}")
    say(f"           and, to let in its clients only: --tls-client-authority {files['authority.pem']}")
    say(f"A command: {TLS_VARIABLES['authority']}={files['authority.pem']} optserve info --target {_target(hosts[0])}")
    say(f"           and, for such a server: {TLS_VARIABLES['certificate']}={pair[0]} {TLS_VARIABLES['key']}={pair[1]}")


def _target(host: str) -> str:
    return f"[{host}]:50051" if ":" in host else f"{host}:50051"
