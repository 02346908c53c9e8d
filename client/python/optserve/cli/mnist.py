"""optserve mnist: train the paper's network on MNIST through a server, and watch it learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from optserve import algorithms
from optserve.cli.console import check_writable, console, fail, say
from optserve.cli.outage import telling_of_outages
from optserve.errors import OptserveError

if TYPE_CHECKING:
    from optserve.client import Client
    from optserve_demo.mnist.data import Dataset
    from optserve_demo.mnist.replicas import Together
    from optserve_demo.mnist.train import Report

    MethodName = str
else:
    # Every one that the package has; a type checker wants them spelled out.
    MethodName = Literal[tuple(algorithms.ALGORITHMS)]
AnnealName = Literal["none", "plateau"]
ActivationName = Literal["tanh", "relu", "logistic"]


def command(
    target: Annotated[
        Optional[str], typer.Option(help="Server, HOST:PORT. Without it a local server is started and stopped.")
    ] = None,
    algorithm: Annotated[MethodName, typer.Option(help="Method.")] = "adadelta",
    rho: Annotated[Optional[float], typer.Option(help="Decay constant; the method's default.")] = None,
    eps: Annotated[Optional[float], typer.Option(help="Conditioning constant; the method's default.")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Learning rate; the method's default.")] = None,
    weight_decay: Annotated[
        float,
        typer.Option(min=0.0, help="Times the weights, added to their gradient; with replicas decoupled from it."),
    ] = 0.0,
    anneal: Annotated[
        AnnealName,
        typer.Option(
            help="plateau: halve the learning rate when the error on 5,000 held-out training images has not fallen "
            "for --patience epochs."
        ),
    ] = "none",
    patience: Annotated[int, typer.Option(min=1, max=10_000, help="Epochs, see --anneal.")] = 2,
    activation: Annotated[ActivationName, typer.Option(help="Hidden units.")] = "tanh",
    epochs: Annotated[int, typer.Option(min=1, max=10_000, help="Passes over the training images.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and the order of the images.")] = 0,
    replicas: Annotated[
        int, typer.Option(min=1, max=4096, help="Replicas that share the weights, which the server then holds.")
    ] = 1,
    consistency: Annotated[
        str, typer.Option(help="How replicas come together: async, bounded:S, sync, or sync:B with B backup workers.")
    ] = "async",
    scale_by_staleness: Annotated[
        bool,
        typer.Option(help="Divide the learning rate by 1 + how many steps old a replica's gradient is."),
    ] = True,
    push_every: Annotated[
        int, typer.Option(min=1, max=10_000, help="Batches of a replica whose mean gradient is one step.")
    ] = 1,
    fetch_every: Annotated[
        int, typer.Option(min=1, max=10_000, help="Batches after which a replica takes new weights.")
    ] = 1,
    data_dir: Annotated[
        Optional[Path], typer.Option(help="Folder with the four IDX files, plain or .gz. Default: fetched and cached.")
    ] = None,
    json: Annotated[Optional[Path], typer.Option("--json", help="Write a report to this file.", dir_okay=False)] = None,
    plot: Annotated[
        Optional[Path], typer.Option(help="Draw the test error per epoch to this .png or .svg.", dir_okay=False)
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of the local server.")] = "auto",
) -> None:
    """Train the paper's 784-500-300-10 network on MNIST, with every update from the server."""
    from optserve import connect
    from optserve_demo.mnist.data import DataError, load
    from optserve_demo.mnist.replicas import Together, consistency_from
    from optserve_demo.mnist.train import Report

    if replicas > 1 and algorithms.ALGORITHMS[algorithm].takes_curvature:
        fail(f"{algorithm} takes curvature, which replicas do not send.", 2)
    if replicas > 1 and anneal != "none":
        fail("--anneal is for a single trainer; replicas have nobody who looks at a plateau for all of them.", 2)
    if anneal != "none" and not hasattr(algorithms.ALGORITHMS[algorithm], "learning_rate"):
        fail(f"{algorithm} has no learning rate to be annealed.", 2)
    together = None
    if replicas > 1:
        kind = consistency_from(consistency, replicas, scale_by_staleness=scale_by_staleness)
        together = Together(replicas, kind, push_every, fetch_every)
    method = _method(algorithm, {"rho": rho, "eps": eps, "learning_rate": learning_rate})
    _check_outputs(json, plot)
    try:
        dataset = load(data_dir, lambda line: say(line, style="dim"))
    except DataError as error:
        fail(str(error))
    report = Report(
        settings={
            "algorithm": {"name": method.name, **asdict(method)},
            "activation": activation,
            "weight_decay": weight_decay,
            "anneal": anneal,
            "patience_epochs": patience if anneal == "plateau" else None,
            "replicas": replicas,
            "consistency": consistency if together else None,
            "scale_by_staleness": scale_by_staleness and together is not None,
            "push_every": push_every,
            "fetch_every": fetch_every,
            "epochs": epochs,
            "seed": seed,
            "data": dataset.source,
        }
    )
    with _server(target, backend) as address, connect(address) as client:
        try:
            _run(client, method, dataset, report, together)
        except KeyboardInterrupt:
            say(f"Stopped after {report.steps:,} steps.")
    if json:
        report.write(json)
        say(f"Report: {json}")
    if plot:
        from optserve_demo.mnist.plot import draw

        draw(report, plot)
        say(f"Plot:   {plot}")
    if len(report.epochs) < epochs:
        raise typer.Exit(130)


def _method(name: str, settings: dict[str, float | None]) -> algorithms.Algorithm:
    kind = algorithms.ALGORITHMS[name]
    given = {option: value for option, value in settings.items() if value is not None}
    known = [field.name for field in fields(kind)]
    for option in given:
        if option not in known:
            fail(f"{name} has no {option}; it has {', '.join(known)}.", 2)
    return kind(**given)


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Find out before the training, not after it, that its results cannot be written."""
    for path in filter(None, (json, plot)):
        if not path.parent.is_dir():
            fail(f"There is no folder {path.parent} to write {path.name} to.", 2)
        check_writable(path)
    if plot:
        if find_spec("matplotlib") is None:
            fail("--plot needs matplotlib: pip install 'optserve[plots]'.", 2)
        if plot.suffix not in (".png", ".svg", ".pdf"):
            fail(f"--plot draws .png, .svg or .pdf, not {plot.suffix or plot.name!r}.", 2)


@contextmanager
def _server(target: str | None, backend: str) -> Iterator[str]:
    if target is not None:
        yield target
        return
    from optserve import local_server

    with console.status("Starting a local server …"):
        server = local_server(backend=backend)
        started = server.__enter__()
    try:
        yield started.target
    finally:
        server.__exit__(None, None, None)


def _run(
    client: Client, method: algorithms.Algorithm, dataset: Dataset, report: Report, together: Together | None
) -> None:
    import uuid

    from optserve_demo.mnist.replicas import train_replicas
    from optserve_demo.mnist.train import Plateau, new_network, train

    info = client.server_info()
    report.server = {
        "target": client.target,
        "version": info.version,
        "backend": info.backend,
        "device": info.device,
        "durability": info.durability,
    }
    settings = report.settings
    network = new_network(dataset, settings["activation"], settings["seed"])
    size = sum(param.size for param in network.params.values())
    say(
        f"{len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images ({dataset.source})\n"
        f"{size:,} weights, {settings['activation']}; {method}\n"
        f"server {client.target}, optserve {info.version}: {info.backend} on {info.device}"
    )
    # A name of its own, so that several trainers can share a server.
    name = f"mnist-{method.name.replace('_', '-')}-{uuid.uuid4().hex[:8]}"
    how = {"epochs": settings["epochs"], "seed": settings["seed"]}
    try:
        with _display(settings["epochs"], report, client.target) as on_progress:
            if together is None:
                optimizer = client.create_optimizer(name, method, network.params)
                decay = settings["weight_decay"]
                plateau = (
                    Plateau(patience_epochs=settings["patience_epochs"]) if settings["anneal"] == "plateau" else None
                )
                train(
                    network, optimizer, dataset, report, **how,
                    on_progress=on_progress, weight_decay=decay, plateau=plateau,
                )  # fmt: skip
            else:
                client.create_optimizer(
                    name,
                    method,
                    network.params,
                    hosted=True,
                    weight_decay=settings["weight_decay"],
                    consistency=together.consistency,
                )
                train_replicas(client, name, network, dataset, report, together, **how, on_progress=on_progress)
    finally:
        # A server that is gone has nothing to be tidied, and must not hide why the training ended.
        with suppress(OptserveError):
            client.delete_optimizer(name, missing_ok=True, timeout_s=5.0)
    say(
        (f"Test error {100 * report.test_error:.2f} %", "bold"),
        f" after {settings['epochs']} epochs: {report.steps:,} steps in {report.seconds:.1f} s, "
        "every update from the server.",
    )


@contextmanager
def _display(epochs: int, report: Report, target: str) -> Iterator[Any]:
    """A live display on a terminal, and everywhere a line per epoch and what there is to say of an outage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from optserve import ClientConfig

    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  test error {task.fields[error]}  {task.fields[rate]:.0f} steps/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display,
        telling_of_outages(target, ClientConfig().step_timeout_s) as moved,
    ):
        task = display.add_task("", epoch=1, epochs=epochs, loss=0.0, error="-", rate=0.0, total=None)
        shown = 0

        def on_progress(progress: Any) -> None:
            nonlocal shown
            moved()
            display.update(
                task,
                total=progress.steps,
                completed=progress.step,
                epoch=progress.epoch,
                loss=progress.loss,
                error=f"{100 * progress.test_error:.2f} %",
                rate=progress.steps_per_s,
            )
            shown = _print_epochs(report, shown)

        yield on_progress
    _print_epochs(report, shown)


def _print_epochs(report: Report, shown: int) -> int:
    for epoch in report.epochs[shown:]:
        say(
            f"epoch {epoch.epoch:>3}   loss {epoch.loss:.4f}   test error {100 * epoch.test_error:5.2f} %   "
            f"{epoch.seconds:6.1f} s"
        )
        for change in report.settings.get("annealed", ()):
            if change["after_epoch"] == epoch.epoch:
                say(f"            learning rate {change['learning_rate']:g} from here on")
    return len(report.epochs)
