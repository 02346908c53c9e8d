"""optserve serve, health and info: run a server, ask whether it lives and what it is."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.table import Table

from optserve.cli.console import DEFAULT_TARGET, Target, console, fail, failing_clearly
from optserve.cli.optimizers import size


def serve(context: typer.Context) -> None:
    """Serve optimizers over gRPC until SIGTERM or Ctrl-C. `optserve serve --help` lists the options."""
    _run("optserve_server", "optserve serve", context.args)


def journal(context: typer.Context) -> None:
    """Verify, count and repair the journal of a data folder. `optserve journal --help` lists the commands."""
    _run("optserve_server.journal_tool", "optserve journal", context.args)


def _run(module: str, name: str, arguments: list[str]) -> None:
    """Run a program of the server, whose package the client's never imports."""
    if find_spec("optserve_server") is None or find_spec("grpc_reflection") is None:
        fail("The server is not installed; pip install 'optserve[server,numba]' brings it.")
    sys.argv = [name, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def health(
    target: Target = DEFAULT_TARGET,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 5.0,
) -> None:
    """Ask a server whether it is serving; exit code 0 if so, 1 if not."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from optserve._proxies import channel_options, proxy_hint

    with grpc.insecure_channel(target, options=channel_options(target)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            said = error.details() if isinstance(error, grpc.Call) else error
            fail(f"{target} does not answer: {said}.{proxy_hint(target)}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        fail(f"{target} is {status}")
    console.print(f"{target} is {status}")


def info(target: Target = DEFAULT_TARGET) -> None:
    """Show what a server is, can do and accepts."""
    from optserve import connect
    from optserve.v1 import service_pb2

    with failing_clearly(), connect(target) as client:
        answer = client.server_info()
    table = Table("", target, show_header=True)
    table.add_row("version", answer.version)
    table.add_row("started", answer.start_time.ToDatetime().isoformat(" ", "seconds") + " UTC")
    table.add_row("backend", f"{answer.backend} on {answer.device}")
    table.add_row("", answer.backend_reason, style="dim")
    table.add_row("durability", answer.durability)
    table.add_row("tensors from here", "shared memory" if client.shares_memory else "gRPC: not this host and user")
    table.add_row("methods", ", ".join(answer.methods))
    table.add_row("optimizers", str(answer.optimizer_count))
    for field, value in answer.limits.ListFields():
        table.add_row(field.name, size(value) if field.name.endswith("bytes") else f"{value:,}")
    for feature in answer.features:
        name = service_pb2.Feature.Name(feature.feature).removeprefix("FEATURE_").lower().replace("_", " ")
        table.add_row(name, "yes" if feature.available else "not in this version")
    console.print(table)
