"""optserve paper: runs the paper's experiments."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from optserve.cli.console import client_config, console, fail, say
from optserve.cli.outage import reporting_outages

if TYPE_CHECKING:
    from optserve.config import ClientConfig

ExperimentName = Literal[
    "table1", "table2", "figure1", "figure2", "figure3", "figure4", "mnist-tanh", "curvature", "annealing", "all"
]


def command(  # noqa: PLR0913 - one for each option
    experiment: Annotated[ExperimentName, typer.Argument(help="What to run.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="A few short runs, to check that everything works; not comparable.")
    ] = False,
    seeds: Annotated[
        Optional[int], typer.Option(min=1, max=100, help="Runs of each setting.", show_default="the experiment's")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, max=256, help="Runs at a time; 0 for one per core that may be used.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results; runs with a result in it are skipped.")] = Path(
        "out/paper"
    ),
    target: Annotated[
        Optional[str], typer.Option(help="Server, HOST:PORT. Without it a local server is started and stopped.")
    ] = None,
    data_dir: Annotated[
        Optional[Path], typer.Option(help="Folder with the four IDX files, plain or .gz. Default: fetched and cached.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of the local server.")] = "auto",
) -> None:
    """Run experiments of the ADADELTA paper through the service, and compare the results with the paper's numbers.

    All runs share one server; each run has its own optimizer. Runs that have a result with the same settings are
    skipped, so an interrupted command continues where it was.
    """
    from optserve import ClientConfig, local_server
    from optserve._common.machine import usable_cores
    from optserve_demo.mnist.data import DataError, load
    from optserve_demo.paper.plan import EXPERIMENTS

    if find_spec("matplotlib") is None or find_spec("threadpoolctl") is None:
        fail("The experiments need matplotlib and threadpoolctl: pip install 'optserve[plots]'.", 2)
    try:
        # Fetched once, before many processes need it.
        load(data_dir, lambda line: say(line, style="dim"))
    except DataError as error:
        fail(str(error))
    names = list(EXPERIMENTS) if experiment == "all" else [experiment]
    with ExitStack() as stack:
        config = ClientConfig() if target is None else client_config()
        server = (target or stack.enter_context(local_server(backend=backend)).target, config)
        for name in names:
            count = 1 if quick else seeds or EXPERIMENTS[name].seeds
            _run(
                name,
                count,
                jobs or usable_cores(),
                out / ("quick" if quick else ""),
                server,
                data_dir,
                quick=quick,
            )


def _run(
    name: str,
    seeds: int,
    jobs: int,
    out: Path,
    server: tuple[str, ClientConfig],
    data_dir: Path | None,
    *,
    quick: bool,
) -> None:
    from optserve_demo.paper import figures, report
    from optserve_demo.paper import jobs as at_work
    from optserve_demo.paper.plan import EXPERIMENTS, STEPS_PER_EPOCH

    experiment = EXPERIMENTS[name]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    plans = [plan for seed in range(seeds) for plan in experiment.runs(seed, quick)]
    results = {plan.key: at_work.kept(folder, plan) for plan in plans}
    if any(plan.replicas for plan in plans):
        # Replicas compute on all cores, and their time is reported.
        jobs = 1
    missing = [plan for plan in plans if results[plan.key] is None]
    if len(missing) < len(plans):
        say(f"{len(plans) - len(missing)} of {len(plans)} runs of {name} were made before.", style="dim")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console) as progress,
        reporting_outages(*server) as record_step,
    ):
        steps = {plan.key: 0 for plan in missing}
        task = progress.add_task(name, total=sum(plan.epochs * STEPS_PER_EPOCH for plan in missing))

        def on_step(key: str, step: int) -> None:
            record_step()
            steps[key] = step
            progress.update(task, completed=sum(steps.values()))

        for result in at_work.carry_out(missing, folder, server, min(jobs, max(len(missing), 1)), data_dir, on_step):
            results[result.key] = result
            ended = "diverged" if result.diverged else f"{result.test_errors[-1]:.2f} %"
            say(f"{name} {result.key}: {ended} in {result.seconds:.0f} s", style="dim", to=progress.console)
    there = [result for result in results.values() if result is not None]
    # In the order of the plan, whatever the order in which the runs ended.
    table = report.rows(experiment, there)
    files = report.write(experiment, table, out, quick=quick) + figures.draw(experiment, there, out)
    text = report.markdown(experiment, table, quick=quick)
    # In a pipe without formatting, so that nothing is cut to the width of a terminal.
    console.print(Markdown(text)) if console.is_terminal else say(text)
    say(f"Written: {', '.join(map(str, files))}")
