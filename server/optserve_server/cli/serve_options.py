"""The options of `optserve serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from optserve_command.config import TARGET_FILE
from optserve_server.domain import config as settings

DEFAULTS = settings.ServerConfig()

Host = Annotated[Optional[str], typer.Option(help="Address to listen on; 0.0.0.0 for all.", show_default=DEFAULTS.host)]
Port = Annotated[Optional[int], typer.Option(help="TCP port; 0 for any free port.", show_default=str(DEFAULTS.port))]
Uds = Annotated[Optional[str], typer.Option(help="Path of a Unix socket to listen on instead of TCP.")]
TlsCertificate = Annotated[
    Optional[Path],
    typer.Option(help="PEM file with the server's certificate. With it, connections are secured.", dir_okay=False),
]
TlsKey = Annotated[Optional[Path], typer.Option(help="PEM file with the certificate's private key.", dir_okay=False)]
TlsClientAuthority = Annotated[
    Optional[Path],
    typer.Option(
        help="PEM file with the authority of the clients' certificates. With it, only clients with one are let in.",
        dir_okay=False,
    ),
]
DataDir = Annotated[
    Optional[str],
    # A text and not a path: the path of an empty text is the working folder.
    typer.Option(help="Folder for state that outlives the process.", metavar="DIRECTORY"),
]
Durability = Annotated[
    Optional[str],
    typer.Option(
        help="memory: state ends with the process. snapshot: state is written to disk every minute. journal: each "
        "step is on disk before it is acknowledged.",
        show_default="journal with --data-dir, else memory",
    ),
]
Backend = Annotated[
    Optional[str],
    typer.Option(help="auto, cupy, numba or numpy. auto uses the fastest that works.", show_default=DEFAULTS.backend),
]
Threads = Annotated[
    Optional[int],
    typer.Option(help="Threads of a CPU kernel; 0 for one per core.", show_default=str(DEFAULTS.threads)),
]
Config = Annotated[
    Optional[Path],
    typer.Option(
        help="TOML file with any of the settings; options and the environment override it.",
        envvar="OPTSERVE_CONFIG",
        dir_okay=False,
    ),
]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Lowest level of the log.")]
TargetFile = Annotated[
    Optional[Path],
    typer.Option(
        help="File with the server's target, for `optserve health` and others; it exists while the server answers.",
        envvar=TARGET_FILE,
        dir_okay=False,
    ),
]
Announce = Annotated[bool, typer.Option("--announce", help="Print `ready TARGET` once the server answers.")]
ExitOnEof = Annotated[bool, typer.Option("--exit-on-eof", help="Stop when standard input ends.")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Show each setting with where it comes from, check them, and end.")
]
