"""Makes many training runs at a time on one server, each in its own process. Runs that have a result are skipped."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from threadpoolctl import threadpool_limits

from optserve.client import Client
from optserve.config import ClientConfig
from optserve.errors import NotFoundError
from optserve_demo.mnist.data import Dataset, load
from optserve_demo.paper.plan import Run
from optserve_demo.paper.training import Result, run, settings_of

REPORT_EVERY = 20
"""Steps between two progress reports of a process."""


def kept(folder: Path, plan: Run) -> Result | None:
    """The result of a run that was made before with the same settings."""
    path = folder / f"{plan.key}.json"
    if not path.is_file():
        return None
    result = Result.read(path)
    return result if result.settings == settings_of(plan) else None


def carry_out(
    plans: Iterable[Run],
    folder: Path,
    server: tuple[str, ClientConfig],
    jobs: int,
    data_dir: Path | None,
    on_step: Callable[[str, int], None],
) -> Iterator[Result]:
    """Make the runs, and yield each result once it is in the folder.

    Args:
        plans: What to run; `kept` ones are not to be among them.
        folder: Takes the results.
        server: Its target, and the settings of the clients.
        jobs: Runs at a time.
        data_dir: Of MNIST's files; None to fetch or use cached ones.
        on_step: Called with (key of a run, steps made), from another thread.
    """
    context = multiprocessing.get_context("spawn")
    reports: SimpleQueue[tuple[str, int] | None] = context.SimpleQueue()
    with (
        _listening(reports, on_step),
        ProcessPoolExecutor(jobs, context, _begin, (server, jobs, data_dir, reports)) as pool,
    ):
        waiting: set[Future[Result]] = {pool.submit(_carry_out, folder.name, plan) for plan in plans}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    result.write(folder / f"{result.key}.json")
                    yield result
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _listening(reports: SimpleQueue[tuple[str, int] | None], on_step: Callable[[str, int], None]) -> Iterator[None]:
    def listen() -> None:
        while (message := reports.get()) is not None:
            on_step(*message)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        reports.put(None)
        thread.join()


class _Worker:
    """What a process of the pool keeps between its runs."""

    client: Client
    dataset: Dataset
    reports: SimpleQueue[tuple[str, int] | None]


def _begin(
    server: tuple[str, ClientConfig], jobs: int, data_dir: Path | None, reports: SimpleQueue[tuple[str, int] | None]
) -> None:
    from optserve import connect

    if jobs > 1:
        # Each process computes on one core, because several threads in each would slow one another.
        threadpool_limits(1)
    _Worker.client, _Worker.reports = connect(*server), reports
    _Worker.dataset = load(data_dir, lambda _line: None)


def _carry_out(experiment: str, plan: Run) -> Result:
    name = f"paper-{experiment}-{plan.key}".replace("+", "")
    # Left by a run that was interrupted.
    with suppress(NotFoundError):
        _Worker.client.delete_optimizer(name)

    reported_step = 0

    def on_step(step: int) -> None:
        nonlocal reported_step
        # Not every step of several replicas is reported.
        if step >= reported_step + REPORT_EVERY:
            reported_step = step
            _Worker.reports.put((plan.key, step))

    return run(_Worker.client, name, plan, _Worker.dataset, on_step)
