"""optserve mnist: train the paper's network on MNIST through a server, and watch it learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from optserve import algorithms
from optserve.cli import mnist_options as options
from optserve.cli.console import check_writable, connect, console, fail, say
from optserve.cli.outage import reporting_outages
from optserve.errors import OptserveError

if TYPE_CHECKING:
    from optserve.client import Client
    from optserve_demo.mnist.data import Dataset
    from optserve_demo.mnist.replicas import Together
    from optserve_demo.mnist.train import Report


def command(  # noqa: PLR0913 - one for each option
    target: options.Target = None,
    algorithm: options.Method = "adadelta",
    rho: options.Rho = None,
    eps: options.Eps = None,
    learning_rate: options.LearningRate = None,
    weight_decay: options.WeightDecay = 0.0,
    anneal: options.Anneal = "none",
    patience: options.Patience = 2,
    activation: options.Activation = "tanh",
    epochs: options.Epochs = 6,
    seed: options.Seed = 0,
    replicas: options.Replicas = 1,
    consistency: options.ConsistencyText = "async",
    scale_by_staleness: options.ScaleByStaleness = True,
    push_every: options.PushEvery = 1,
    fetch_every: options.FetchEvery = 1,
    data_dir: options.DataDir = None,
    json: options.Json = None,
    plot: options.Plot = None,
    backend: options.Backend = "auto",
) -> None:
    """Train the paper's 784-500-300-10 network on MNIST, with every update from the server."""
    from optserve_demo.mnist.train import Report

    _check_they_go_together(algorithm, replicas, anneal)
    together = _together(replicas, consistency, push_every, fetch_every, scale_by_staleness=scale_by_staleness)
    method = _method(algorithm, {"rho": rho, "eps": eps, "learning_rate": learning_rate})
    _check_outputs(json, plot)
    dataset = _dataset(data_dir)
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
    with _connected(target, backend) as client:
        try:
            _run(client, method, dataset, report, together)
        except KeyboardInterrupt:
            say(f"Stopped after {report.steps:,} steps.")
    _write(report, json, plot)
    if len(report.epochs) < epochs:
        raise typer.Exit(130)


def _check_they_go_together(algorithm: str, replicas: int, anneal: str) -> None:
    """End with a usage error if two options exclude each other."""
    kind = algorithms.ALGORITHMS[algorithm]
    if replicas > 1 and kind.takes_curvature:
        fail(f"{algorithm} takes curvature, which replicas do not send.", 2)
    if replicas > 1 and anneal != "none":
        fail("--anneal is for a single trainer; replicas have no common test for a plateau.", 2)
    if anneal != "none" and not hasattr(kind, "learning_rate"):
        fail(f"{algorithm} has no learning rate that could be annealed.", 2)


def _together(
    replicas: int, consistency: str, push_every: int, fetch_every: int, *, scale_by_staleness: bool
) -> Together | None:
    """The options of replicas; None for a single trainer."""
    from optserve_demo.mnist.replicas import Together, consistency_from

    if replicas == 1:
        return None
    kind = consistency_from(consistency, replicas, scale_by_staleness=scale_by_staleness)
    return Together(replicas, kind, push_every, fetch_every)


def _dataset(data_dir: Path | None) -> Dataset:
    from optserve_demo.mnist.data import DataError, load

    try:
        return load(data_dir, lambda line: say(line, style="dim"))
    except DataError as error:
        fail(str(error))


def _write(report: Report, json: Path | None, plot: Path | None) -> None:
    """Write the report and the plot, if the user asks for them."""
    if json:
        report.write(json)
        say(f"Report: {json}")
    if plot:
        from optserve_demo.mnist.plot import draw

        draw(report, plot)
        say(f"Plot:   {plot}")


def _method(name: str, settings: dict[str, float | None]) -> algorithms.Algorithm:
    kind = algorithms.ALGORITHMS[name]
    given = {option: value for option, value in settings.items() if value is not None}
    known = [field.name for field in fields(kind)]
    for option in given:
        if option not in known:
            fail(f"{name} has no {option}; it has {', '.join(known)}.", 2)
    return kind(**given)


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Check before the training that its results can be written."""
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
def _connected(target: str | None, backend: str) -> Iterator[Client]:
    """A client of that server, or of a local one that ends with the with-block."""
    if target is not None:
        with connect(target) as client:
            yield client
        return
    import optserve

    with console.status("Starting a local server …"):
        server = optserve.LocalServer.start(backend=backend)
    try:
        with optserve.connect(server.target) as client:
            yield client
    finally:
        server.stop()


def _run(
    client: Client, method: algorithms.Algorithm, dataset: Dataset, report: Report, together: Together | None
) -> None:
    import uuid

    from optserve_demo.mnist.replicas import train_replicas
    from optserve_demo.mnist.train import Plateau, Task, new_network, train

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
    task = Task(network, dataset, report, settings["epochs"], settings["seed"])
    try:
        with _display(settings["epochs"], report, client) as on_progress:
            if together is None:
                optimizer = client.create_optimizer(name, method, network.params)
                decay = settings["weight_decay"]
                plateau = (
                    Plateau(patience_epochs=settings["patience_epochs"]) if settings["anneal"] == "plateau" else None
                )
                train(task, optimizer, on_progress, weight_decay=decay, plateau=plateau)
            else:
                client.create_optimizer(
                    name,
                    method,
                    network.params,
                    hosted=True,
                    weight_decay=settings["weight_decay"],
                    consistency=together.consistency,
                )
                train_replicas(task, client, name, together, on_progress)
    finally:
        # If the server is gone, there is nothing to delete; this error must not hide why the training ended.
        with suppress(OptserveError):
            client.delete_optimizer(name, missing_ok=True, timeout_s=5.0)
    say(
        (f"Test error {100 * report.test_error:.2f} %", "bold"),
        f" after {settings['epochs']} epochs: {report.steps:,} steps in {report.seconds:.1f} s, "
        "every update from the server.",
    )


@contextmanager
def _display(epochs: int, report: Report, client: Client) -> Iterator[Any]:
    """A live display on a terminal; in every case a line per epoch, and lines about outages."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        reporting_outages(client.target, client._connection.config) as record_step,
    ):
        task = display.add_task("", epoch=1, epochs=epochs, loss=0.0, error="-", rate=0.0, total=None)
        shown = 0

        def on_progress(progress: Any) -> None:
            nonlocal shown
            record_step()
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
