"""optserve serve, journal, config, health and info: run a server, inspect its folder, settings, health and limits."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from optserve.cli.as_json import Json, plain, print_json
from optserve.cli.console import DEFAULT_TARGET, Target, connect, fail, show_table, size
from optserve_command import probe


def serve(context: typer.Context) -> None:
    """Serve optimizers over gRPC until SIGTERM or Ctrl-C. `optserve serve --help` lists the options."""
    _run("optserve_server", "optserve serve", context.args)


def journal(context: typer.Context) -> None:
    """Verify, count and repair the journal of a data folder. `optserve journal --help` lists the commands."""
    _run("optserve_server.cli.journal", "optserve journal", context.args)


def config(context: typer.Context) -> None:
    """List the settings for a server's TOML file, and those that a given file sets. See `optserve config --help`."""
    _run("optserve_server.cli.config", "optserve config", context.args)


def _run(module: str, name: str, arguments: list[str]) -> None:
    """Run a program of the server as its own main module: the client never imports the server."""
    if find_spec("optserve_server") is None or find_spec("grpc_reflection") is None:
        fail("The server is not installed; pip install 'optserve[server,numba]' installs it.")
    sys.argv = [name, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def health(
    target: Target = DEFAULT_TARGET,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = probe.DEFAULT_TIMEOUT_S,
    json: Json = False,
) -> None:
    """Ask a server whether it is serving; exit code 0 if so, 1 if not."""
    raise typer.Exit(probe.report(target, timeout_s, json))


def info(target: Target = DEFAULT_TARGET, json: Json = False) -> None:
    """Show the version, the backend, the limits and the features of a server."""
    from optserve.v1 import service_pb2

    with connect(target) as client:
        answer = client.server_info()
        shares_memory = client.shares_memory
    if json:
        print_json({"target": target, "shares_memory": shares_memory, **plain(answer)})
        return
    rows = [
        ["version", answer.version],
        ["started", answer.start_time.ToDatetime().isoformat(" ", "seconds") + " UTC"],
        ["backend", f"{answer.backend} on {answer.device}"],
        ["why", answer.backend_reason],
        ["durability", answer.durability],
        *([["problem", answer.durability_problem]] if answer.durability_problem else []),
        ["tensors from here", "shared memory" if shares_memory else "gRPC: not this host and user"],
        ["methods", ", ".join(answer.methods)],
        ["optimizers", str(answer.optimizer_count)],
    ]
    for field, value in answer.limits.ListFields():
        rows.append([field.name, size(value) if field.name.endswith("bytes") else f"{value:,}"])
    for feature in answer.features:
        known = service_pb2.Feature.DESCRIPTOR.values_by_number.get(feature.feature)
        name = known.name.removeprefix("FEATURE_").lower().replace("_", " ") if known else f"feature {feature.feature}"
        rows.append([name, "yes" if feature.available else "not in this version"])
    show_table(("", target), rows, folded=target)
